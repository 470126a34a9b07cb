"""Draws what the model is asked while it learns, and makes a tokenizer for it. prompts.json has the wordings."""

import json
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from flax_vlm.demo import Question, Speech
from flax_vlm.demo.talking import PLACE
from flax_vlm.processing import Tokenizer
from flax_vlm.processing.idefics import FAKE, IMAGE

T = TypeVar("T")

# Padding is the unknown token, as in IDEFICS.
SPECIAL_TOKENS = {"pad_token": "<unk>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
IMAGE_TOKENS = [FAKE, IMAGE]
FIRST_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]  # as LLaMA numbers them
WITHOUT_SPACES = ("zh",)
WORDS_INSTEAD = 0.2  # of the pictures in questions for the larger digit


class Questions:
    """Draws questions about the pictures that have these labels."""

    def __init__(self, speeches: Sequence[Speech], labels: np.ndarray) -> None:
        self.speeches = speeches
        self.of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]

    def draw(self, rng: np.random.Generator) -> Question:
        """Two of three are about naming."""
        speech = pick(rng, self.speeches)
        if rng.random() < 2 / 3:
            prompt = pick(rng, pick(rng, speech.naming))
            digits = tuple(rng.integers(10, size=prompt.count(PLACE)).tolist())
            return Question(speech, "naming", prompt, self._pictures(rng, digits), digits)
        pair = rng.choice(10, size=2, replace=False).tolist()
        before, between, after = pick(rng, speech.larger).split(PLACE)
        first, second = (speech.words[digit] if rng.random() < WORDS_INSTEAD else PLACE for digit in pair)
        shown = [digit for digit, item in zip(pair, (first, second), strict=True) if item == PLACE]
        prompt = f"{before}{first}{between}{second}{after}"
        return Question(speech, "larger", prompt, self._pictures(rng, shown), (max(pair),))

    def _pictures(self, rng: np.random.Generator, digits: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(rng.choice(self.of_digit[digit])) for digit in digits)


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def make_tokenizer(speeches: Sequence[Speech]) -> Tokenizer:
    """Byte-pair encoding with byte fallback, of a few hundred pieces; the tokens around pictures come last."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    texts = (unit for speech in speeches for unit in units(speech))
    trained.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = [*FIRST_PIECES, *sorted(learned["vocab"], key=learned["vocab"].__getitem__)]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = trained.pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*FIRST_PIECES[:3], *IMAGE_TOKENS]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return Tokenizer(backend, SPECIAL_TOKENS | {"additional_special_tokens": IMAGE_TOKENS, "padding_side": "left"})


def units(speech: Speech) -> Iterator[str]:
    """What the tokenizer learns from: single characters of a script without spaces, else it would join sentences."""
    prompts = PLACE.join(prompt for wordings in (*speech.naming, speech.larger) for prompt in wordings)
    texts = [text.strip(" ") for text in prompts.split(PLACE)]  # as the processor does
    for text in (*texts, speech.say(range(10)), *(speech.say([digit]) for digit in range(10))):
        yield from text if speech.code in WITHOUT_SPACES else [text]
