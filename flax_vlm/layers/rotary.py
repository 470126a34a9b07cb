"""Rotary position embeddings (RoFormer, arXiv:2104.09864).

`rotate` pairs channel j with j + H/2, as LLaMA does; `rotate_interleaved` pairs neighbours, as RoFormer and GLM do.

B batch   T tokens   N heads   H head width
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from flax_vlm.layers.linear import wide


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles."""

    cos: Float[Array, "#B T 1 half"]
    sin: Float[Array, "#B T 1 half"]


def rotation(positions: Int[Array, "#B T"], head_dim: int, theta: float, dtype: Dtype) -> Rotation:
    """The rotation for `positions`, of any size. Angles are computed in at least float32, then cast to `dtype`."""
    # On the host, rounded after each step as torch does: XLA would make products of the divisions, and what a frequency
    # is off by, its angle is off by as often as the position says.
    exponents = np.arange(0, head_dim, 2, dtype=wide(dtype)) / head_dim
    frequencies = 1 / (theta ** exponents.astype(np.float64)).astype(wide(dtype))
    angles = positions[..., None, None].astype(wide(dtype)) * frequencies
    return Rotation(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def rotate(states: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pair (j, j + H/2) of every head by its angle."""
    first, second = jnp.split(states, 2, axis=-1)
    return jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)


def rotate_interleaved(states: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pair (2j, 2j + 1) of every head by its angle; channels past twice the number of angles stay."""
    turning = 2 * by.cos.shape[-1]
    first, second = states[..., :turning:2], states[..., 1:turning:2]
    turned = jnp.stack([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
    turned = turned.reshape(*states.shape[:-1], turning)
    return jnp.concatenate([turned, states[..., turning:]], axis=-1)
