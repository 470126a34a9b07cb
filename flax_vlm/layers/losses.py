"""Losses of language models.

B batch   T tokens   V vocabulary
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from flax_vlm.layers.linear import wide

IGNORED = -100  # a label that does not count


def next_token_loss(
    logits: Float[Array, "B T V"],
    labels: Int[Array, "B T"],
    attention_mask: Num[Array, "B T"] | Bool[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of token t + 1 under the logits at t, in at least float32.

    A position counts where its next label is not -100 and its next token is no padding. With no such position the loss
    is 0.
    """
    targets = labels[:, 1:]
    counts = targets != IGNORED
    if attention_mask is not None:
        counts &= attention_mask[:, 1:] != 0
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(wide(logits.dtype)), axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(counts, picked, 0).sum() / jnp.maximum(counts.sum(), 1)
