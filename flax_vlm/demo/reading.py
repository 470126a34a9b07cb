"""What a small AltCLIP reads in pictures of digits, in several languages.

A pictures   L languages
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image

from flax_vlm import zero_shot
from flax_vlm.pretrained import VLM

EXAMPLE_WORD = 7  # whose word stands in the sentences that are shown


@dataclass(frozen=True)
class Language:
    """`words[d]` are the names of digit d, the usual one first; `{}` in a sentence stands for one of them."""

    code: str
    language: str
    native: str
    zero_shot: str
    words: Sequence[Sequence[str]]
    templates: Sequence[str]

    def word(self, digit: int) -> str:
        """The usual name of a digit."""
        return self.words[digit][0]

    def prompt(self, digit: int) -> str:
        """The sentence that pictures are compared with."""
        return self.zero_shot.format(self.word(digit))


@dataclass(frozen=True)
class Reading:
    """Pictures, what they show, and how probable the model finds each digit in each language."""

    languages: Sequence[Language]
    images: UInt8[np.ndarray, "A 8 8"]
    labels: Integer[np.ndarray, " A"]
    probabilities: Float[np.ndarray, "A L 10"]

    @property
    def digits(self) -> Integer[np.ndarray, "A L"]:
        """The likeliest digit."""
        return self.probabilities.argmax(-1)

    @property
    def right(self) -> Bool[np.ndarray, "A L"]:
        return self.digits == self.labels[:, None]

    @property
    def accuracy(self) -> Float[np.ndarray, " L"]:
        return self.right.mean(0)

    def one_of_each(self) -> list[int]:
        """For every digit the first picture that is read rightly in all languages, where there is one."""
        of_digit = [np.flatnonzero(self.labels == digit) for digit in range(10)]
        return [int(indices[self.right[indices].all(1).argmax()]) for indices in of_digit]

    def hardest(self, count: int) -> list[int]:
        """The pictures whose true digit is least probable, over all languages."""
        of_the_truth = self.probabilities[np.arange(len(self.labels)), :, self.labels].mean(1)
        return [int(index) for index in np.argsort(of_the_truth, kind="stable")[:count]]


def read_languages(example: Path) -> list[Language]:
    """The languages of an example's captions.json."""
    return [Language(**entry) for entry in json.loads((example / "captions.json").read_text("utf-8"))]


def read_pictures(
    vlm: VLM, languages: Sequence[Language], images: UInt8[np.ndarray, "A 8 8"], labels: Integer[np.ndarray, " A"]
) -> Reading:
    """Compares every picture with ten sentences in every language."""
    pictures = [Image.fromarray(image) for image in images]
    probabilities = [
        zero_shot.classify(
            vlm,
            pictures,
            [language.word(digit) for digit in range(10)],
            template=language.zero_shot,
            batch_size=len(pictures),
        )
        for language in languages
    ]
    return Reading(languages, images, labels, np.stack(probabilities, axis=1))


def read_held_out(vlm: VLM, example: Path) -> Reading:
    """Reads the pictures of the example's heldout.npz, none of which the model was trained on."""
    with np.load(example / "heldout.npz") as held_out:
        return read_pictures(vlm, read_languages(example), held_out["images"], held_out["labels"])
