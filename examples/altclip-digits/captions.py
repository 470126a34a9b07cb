"""What a picture of a digit may be called: six languages, nine sentences each, and a tokenizer that reads them.

captions.json holds the words and the sentences. Its `zero_shot` sentences, one a language, are those of the evaluation;
none of them is among the sentences of the training.
"""

import io
from pathlib import Path

import numpy as np
import sentencepiece

from flax_vlm import demo
from flax_vlm.demo import Language
from flax_vlm.processing import Tokenizer
from flax_vlm.processing.sentencepiece import SentencePieceModel, xlm_roberta_tokenizer

HERE = Path(__file__).parent
DIGITS = range(10)
WITHOUT_SPACES = ("zh", "ja")
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def captions_of(language: Language, digit: int) -> list[str]:
    """Every training caption of `digit`; the usual name counts as often as the others and the numeral together."""
    usual, *others = language.words[digit]
    names = [usual] * (len(others) + 1) + [*others, str(digit)]
    return [template.format(name) for template in language.templates for name in names]


def draw(rng: np.random.Generator, captions: list[list[list[str]]]) -> list[str]:
    """One caption for each digit, each in a language of its own; `captions[language][digit]` is the choice."""
    chosen = [captions[rng.integers(len(captions))][digit] for digit in DIGITS]
    return [choice[rng.integers(len(choice))] for choice in chosen]


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A sentencepiece unigram model of the captions, with XLM-R's ids: `<s> <pad> </s> <unk> ... <mask>`.

    It is shown single words, and single characters where a script has no spaces: whole sentences of so small a corpus
    would become pieces, and a new sentence would be read in pieces that no caption of the training has. Each comes in
    three forms, because sentencepiece takes for a piece only what it has met more than once.
    """
    units = [str(digit) for digit in DIGITS]
    for language in demo.read_languages(HERE):
        units += [name for names in language.words for name in names]
        for template in language.templates:
            words = template.replace("{}", " ").split()
            units += "".join(words) if language.code in WITHOUT_SPACES else words
    corpus = [form.format(unit) for unit in units for form in ("{}", "{}.", "{},")]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=buffer,
        # The file has no <pad> and no <mask>, which the layout adds.
        vocab_size=vocab_size - 2,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    backend = xlm_roberta_tokenizer(SentencePieceModel.parse(buffer.getvalue()))
    return Tokenizer(backend, SPECIAL_TOKENS)
