"""Rotary position embeddings (RoFormer, arXiv:2104.09864), in the half-split convention of LLaMA.

B batch   T tokens   N heads   H head width
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from flax_vlm.layers.linear import wide


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles."""

    cos: Float[Array, "#B T 1 half"]
    sin: Float[Array, "#B T 1 half"]


def rotation(positions: Int[Array, "#B T"], head_dim: int, theta: float, dtype: Dtype) -> Rotation:
    """The rotation for `positions`, of any size. Angles are computed in at least float32, then cast to `dtype`."""
    exponents = jnp.arange(0, head_dim, 2, dtype=wide(dtype)) / head_dim
    angles = positions[..., None, None].astype(wide(dtype)) / theta**exponents
    return Rotation(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def rotate(states: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pair (j, j + H/2) of every head by its angle."""
    first, second = jnp.split(states, 2, axis=-1)
    return jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
