"""stub"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image


@dataclass(frozen=True)
class Language:
    """`words[d]` are the names of digit d, the usual one first; `{}` in a sentence stands for the name."""

    code: str
    language: str
    native: str
    zero_shot: str
    words: list[list[str]]
    templates: list[str]

    @property
    def usual_words(self) -> list[str]:
        return [names[0] for names in self.words]

    @property
    def prompts(self) -> list[str]:
        """The ten sentences that a picture is held against."""
        return [self.zero_shot.format(word) for word in self.usual_words]


def read_languages(example: Path) -> list[Language]:
    return [Language(**entry) for entry in json.loads((example / "captions.json").read_text("utf-8"))]


def zero_shot(
    vlm: Any, images: Shaped[np.ndarray, "A h w"], languages: Sequence[Language]
) -> Float[np.ndarray, "A L 10"]:
    inputs = vlm.processor(
        text=[prompt for language in languages for prompt in language.prompts],
        images=[Image.fromarray(image) for image in images],
    )
    logits = vlm(**inputs).logits_per_image.reshape(len(images), len(languages), 10)
    return np.asarray(jax.nn.softmax(logits))


def evaluate(vlm, example, images, labels):
    languages = read_languages(example)
    p = zero_shot(vlm, images, languages)
    return {l.language: float((p[:, i].argmax(-1) == labels).mean()) for i, l in enumerate(languages)}
