"""Losses that pull the two sides of a pair together and apart from all others, over a few images at a time.

Logits of all texts against all images, [B, B], grow with the square of the batch. Here each chunk of images meets all
texts, is added up, and is computed again in the backward pass. Text i belongs to image i; the whole batch stands in one
array, however it is split over devices.

B pairs   E width of the common space   C images of a chunk
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from flax_vlm.layers.partitioning import constrain


def softmax_contrastive_sum(
    texts: Float[Array, "B E"], images: Float[Array, "B E"], scale: Float[Array, ""], chunk: int = 0
) -> Float[Array, ""]:
    """Cross-entropy of a text over all images and of its image over all texts, their mean, summed over pairs (CLIP).

    Args:
      texts, images: of unit length.
      scale: of their products.
      chunk: how many images at a time, a divisor of B; 0 takes all at once.

    Raises:
      ValueError: for texts and images that are no pairs, or that `chunk` does not divide evenly.
    """

    def add(carry: tuple[Array, Array], logits: Array) -> tuple[Array, Array]:
        over_images, over_texts = carry
        over_images = jnp.logaddexp(over_images, jax.nn.logsumexp(logits, axis=1))
        return over_images, over_texts + jax.nn.logsumexp(logits, axis=0).sum()

    nothing = jnp.full(len(texts), -jnp.inf, texts.dtype), jnp.zeros((), texts.dtype)
    over_images, over_texts = _over_images(add, nothing, texts, images, scale, chunk)
    return (over_images.sum() + over_texts) / 2 - scale * (texts * images).sum()


def sigmoid_contrastive_sum(
    texts: Float[Array, "B E"],
    images: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: float | Float[Array, ""],
    chunk: int = 0,
) -> Float[Array, ""]:
    """Is it a pair, asked of every text and image (SigLIP, arXiv:2303.15343): cross-entropies, summed over all B * B.

    Divided by the pairs, B, it is the paper's loss. `bias` is added to all logits, and starts at -10 there: nearly all
    are no pairs. Other arguments and errors are those of `softmax_contrastive_sum`.
    """

    def add(total: Array, logits: Array) -> Array:
        return total + jax.nn.softplus(logits + bias).sum()

    # A pair costs softplus(-logit) = softplus(logit) - logit.
    everything = _over_images(add, jnp.zeros((), texts.dtype), texts, images, scale, chunk)
    return everything - scale * (texts * images).sum() - bias * len(texts)


def _over_images(
    add: Callable[[Any, Array], Any], carry: Any, texts: Array, images: Array, scale: Array, chunk: int
) -> Any:
    """`carry = add(carry, logits [B, C])` over chunks of images."""
    if texts.shape != images.shape:
        raise ValueError(f"a contrastive loss pairs texts and images: {texts.shape} texts, {images.shape} images came")
    chunk = chunk or len(images)
    if len(images) % chunk:
        raise ValueError(f"chunk={chunk} does not divide {len(images)} pairs evenly: expected a divisor")
    # Each device needs all images for its texts: gathered here once, not in every chunk.
    chunks = constrain(images, (None, None)).reshape(-1, chunk, images.shape[-1])

    @partial(jax.checkpoint, prevent_cse=False)
    def visit(carry: Any, images: Array) -> tuple[Any, None]:
        logits = jnp.einsum("be,ce->bc", texts, images, preferred_element_type=texts.dtype) * scale
        return add(carry, constrain(logits, ("batch", None))), None

    return lax.scan(visit, carry, chunks)[0]
