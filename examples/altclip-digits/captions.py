"""What a picture of a digit may be called, in six languages, and a tokenizer that reads it.

captions.json holds the words and the sentences. Its `zero_shot` sentences, one a language, are those of the evaluation:
none of them is among the sentences of the training.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from flax_vlm import demo
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


class Captions:
    """Draws captions of a digit."""

    def __init__(self, languages: Sequence[demo.Language]) -> None:
        self._of = [[captions_of(language, digit) for language in languages] for digit in DIGITS]

    def draw(self, rng: np.random.Generator, digit: int) -> list[str]:
        """One in each language."""
        return [captions[rng.integers(len(captions))] for captions in self._of[digit]]


def captions_of(language: demo.Language, digit: int) -> list[str]:
    """All training captions of a digit; its usual name counts as often as its others and the numeral together."""
    usual, *others = language.words[digit]
    names = [usual] * (len(others) + 1) + [*others, str(digit)]
    return [template.format(name) for template in language.templates for name in names]


def train_tokenizer(languages: Sequence[demo.Language]) -> Tokenizer:
    """A sentencepiece unigram model of a few hundred pieces, with XLM-R's ids: `<s> <pad> </s> <unk> ... <mask>`.

    It is shown single words, and single characters where a script has no spaces: whole sentences of so small a corpus
    would become pieces, and a new sentence would be read in pieces that no caption of the training has. Each comes in
    three forms, because sentencepiece takes for a piece only what it has met more than once.
    """
    units = [str(digit) for digit in DIGITS]
    for language in languages:
        units += [name for names in language.words for name in names]
        for template in language.templates:
            words = template.replace("{}", " ").split()
            units += "".join(words) if language.code in WITHOUT_SPACES else words
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(form.format(unit) for unit in units for form in ("{}", "{}.", "{},")),
        model_writer=buffer,
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer(xlm_roberta_tokenizer(SentencePieceModel.parse(buffer.getvalue())), SPECIAL_TOKENS)
