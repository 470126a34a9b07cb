"""Embedding texts and pictures in bulk, and classifying pictures by sentences (CLIP, arXiv:2103.00020, 3.1).

N texts or pictures   L labels   E projection_dim
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from flax_vlm.pretrained import VLM

Item = TypeVar("Item")
Progress = Callable[[Iterable[Any]], Iterable[Any]]  # tqdm, say; receives the batches


def embed_texts(
    vlm: VLM, texts: Sequence[str], *, batch_size: int = 64, progress: Progress = iter
) -> Float[np.ndarray, "N E"]:
    """The texts as unit vectors, float32. Lengths are padded to multiples of 16, so that few shapes are compiled."""

    def embed(batch: Sequence[str]) -> Any:
        return vlm.get_text_features(**vlm.processor(text=list(batch), pad_to_multiple_of=16))

    return _embed(embed, texts, batch_size, progress)


def embed_images(
    vlm: VLM, images: Sequence[Any], *, batch_size: int = 32, progress: Progress = iter
) -> Float[np.ndarray, "N E"]:
    """Pictures (whatever `processing.load_image` takes) as unit vectors, float32."""

    def embed(batch: Sequence[Any]) -> Any:
        return vlm.get_image_features(**vlm.processor(images=list(batch)))

    return _embed(embed, images, batch_size, progress)


def classify(
    vlm: VLM, images: Sequence[Any], labels: Sequence[str], *, template: str = "{}", batch_size: int = 32
) -> Float[np.ndarray, "N L"]:
    """The probability of each label for each picture: a softmax over the model's scaled cosines.

    Args:
      template: the sentence to put a label in, "a photo of {}" say.

    Raises:
      ValueError: for a template without a place for the label, or fewer than two labels.
    """
    if "{}" not in template:
        raise ValueError(f"template {template!r}: expected {{}} where the label goes, as in 'a photo of {{}}'")
    if len(labels) < 2:
        raise ValueError(f"expected at least two labels to choose from, came {len(labels)}")
    texts = embed_texts(vlm, [template.replace("{}", label) for label in labels], batch_size=batch_size)
    pictures = embed_images(vlm, images, batch_size=batch_size)
    logits = np.exp(np.float32(vlm.params["logit_scale"])) * pictures @ texts.T
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def _embed(
    embed: Callable[[Sequence[Item]], Any], items: Sequence[Item], batch_size: int, progress: Progress
) -> Float[np.ndarray, "N E"]:
    if not items:
        raise ValueError("expected at least one text or picture, came none")
    size = min(batch_size, len(items))
    features = [np.asarray(embed(batch), np.float32)[:count] for batch, count in progress(list(_batches(items, size)))]
    stacked = np.concatenate(features)
    return stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)


def _batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Batches of one size and how many of each count: the last one is filled up, so that nothing compiles for it."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + [batch[-1]] * (size - len(batch)), len(batch)
