"""Makes a tokenizer of GLM-4's kind for what the model is asked, and answers."""

from collections.abc import Iterator, Sequence

from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from flax_vlm.demo import SceneSpeech
from flax_vlm.processing import Tokenizer
from flax_vlm.processing.byte_pairs import GLM4_PATTERN, byte_letters, glm4_tokenizer

# In the order of glm-4-9b, where they follow the vocabulary.
SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>"]
SPECIAL += ["<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>"]
PIECES = 1000  # at most: 256 bytes, and what is joined of them
WITHOUT_SPACES = ("zh",)


def make_tokenizer(speeches: Sequence[SceneSpeech], image_size: int) -> Tokenizer:
    """Byte pairs, ranked as tiktoken does it, with the special tokens behind them."""
    trained = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(GLM4_PATTERN), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator((unit for speech in speeches for unit in units(speech)), trainer)
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary = trained.get_vocab()
    ranks = {bytes(map(byte_of.__getitem__, piece)): rank for piece, rank in vocabulary.items()}
    backend = glm4_tokenizer(ranks, {token: len(ranks) + i for i, token in enumerate(SPECIAL)})
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    named = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "additional_special_tokens": SPECIAL}
    return Tokenizer(backend, named | {"padding_side": "left", "image_size": image_size})


def units(speech: SceneSpeech) -> Iterator[str]:
    """What the tokenizer learns from. Names come often, so that each is one piece or two."""
    names = [*speech.words, *speech.places, speech.nothing]
    sentences = [text for wordings in (speech.which, speech.where, speech.every) for text in wordings]
    parts = [part for text in sentences for part in text.split("{}") if part]
    for text in [*names * 3, *speech.separators, *parts]:
        yield from text if speech.code in WITHOUT_SPACES else [text, " " + text]
