"""What is done with rows: prompts are answered, pictures and texts become vectors.

N rows   E width of the space that pictures and texts share
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from flax_vlm import parallel
from flax_vlm.generation import bucket_length
from flax_vlm.inference.engine import Done, Size, Work, in_order
from flax_vlm.processing.prompts import blanked, no_pixels


class Answer(NamedTuple):
    """What a model says to a prompt.

    Attributes:
      tokens: of the answer, the one that ended it among them.
      finish_reason: "stop" where the model ended it, "length" where there was no room for more.
    """

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


class Answers:
    """Prompts, as the processor takes them, to `Answer`s. A chat is answered with what the assistant says next.

    Args:
      seed: of sampling: every row draws by it and by its own number, whatever batch it is in.
      options: of `vlm.generate`.

    Raises:
      ValueError: for a model that does not generate, or without a tokenizer, and for options that cannot be.
    """

    def __init__(self, vlm: Any, *, seed: int = 0, **options: Any) -> None:
        if vlm.generation_config is None:
            raise ValueError(f"expected a model that generates text, came a {type(vlm.model).__name__}")
        if vlm.processor is None:
            raise ValueError("expected the files of a tokenizer beside the weights. Copy them from the original")
        self._vlm = vlm
        self._options = options
        self._config = vlm.generation_config.updated(**options)
        self._seed = seed

    def measure(self, prompt: Any, /) -> Size:
        blank, pictures = blanked(prompt)
        inputs = self._vlm.processor([blank], padding=False, transform=no_pixels, **_layout([blank]))
        return Size(inputs["input_ids"].shape[1], len(pictures))

    def read(self, prompts: list[Any], size: Size, /) -> dict[str, np.ndarray]:
        return self._vlm.processor(prompts, pad_images_to_multiple_of=size.images or None, **_layout(prompts))

    def compute(self, inputs: Mapping[str, np.ndarray], rows: Sequence[int], /) -> list[Answer]:
        seeds = {"seed": [_seed(self._seed, row) for row in rows]} if self._config.do_sample else {}
        out = self._vlm.generate(**_placed(self._vlm, inputs), **self._options, **seeds)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        return [self._answer(ids[:length]) for ids, length in zip(new, out.lengths.tolist(), strict=True)]

    def _answer(self, ids: np.ndarray) -> Answer:
        processor = self._vlm.processor
        text = processor.decode(ids).removeprefix(processor.answer_begins)
        stopped = len(ids) > 0 and int(ids[-1]) in self._config.stop_ids
        return Answer(text, len(ids), "stop" if stopped else "length")


class PictureVectors:
    """Pictures, whatever `processing.load_image` takes, to vectors [E]."""

    measure = None  # all are made one size

    def __init__(self, vlm: Any) -> None:
        self._vlm = vlm

    def read(self, images: list[Any], size: Size, /) -> dict[str, np.ndarray]:
        return self._vlm.processor(images=images)

    def compute(self, inputs: Mapping[str, np.ndarray], rows: Sequence[int], /) -> np.ndarray:
        return _vectors(self._vlm.get_image_features(**_placed(self._vlm, inputs)))


class TextVectors:
    """Texts to vectors [E]; what is longer than the model reads is cut."""

    def __init__(self, vlm: Any) -> None:
        self._vlm = vlm

    def measure(self, text: str, /) -> Size:
        return Size(self._vlm.processor(text=[text])["input_ids"].shape[1])

    def read(self, texts: list[str], size: Size, /) -> dict[str, np.ndarray]:
        return self._vlm.processor(text=texts, pad_to_multiple_of=bucket_length(size.tokens))

    def compute(self, inputs: Mapping[str, np.ndarray], rows: Sequence[int], /) -> np.ndarray:
        return _vectors(self._vlm.get_text_features(**_placed(self._vlm, inputs)))


def embed(work: Work, items: Sequence[Any], batch_size: int, done: Done = lambda _: None) -> Float[np.ndarray, "N E"]:
    """The unit vectors of `PictureVectors` or `TextVectors`, of all rows at once."""
    return unit(np.stack(in_order(work, items, batch_size, done)))


def unit(vectors: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N E"]:
    """The vectors at length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _vectors(features: Any) -> np.ndarray:
    """In float32 at least."""
    features = np.asarray(features)
    return features.astype(np.promote_types(np.float32, features.dtype))


def _placed(vlm: Any, inputs: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """Inputs whose rows are split over the model's mesh, if it has one."""
    if vlm.mesh is None:
        return inputs
    return jax.device_put(dict(inputs), parallel.batch_sharding(vlm.mesh, vlm.rules))


def _layout(prompts: Sequence[Any]) -> dict[str, Any]:
    is_chat = any(isinstance(item, Mapping) for item in prompts[0])
    return {"add_generation_prompt": True} if is_chat else {}


def _seed(seed: int, row: int) -> int:
    return int(np.random.SeedSequence([seed, row]).generate_state(1)[0])
