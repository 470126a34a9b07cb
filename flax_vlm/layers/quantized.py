"""Weights in eight bits, for running: a kernel that is an int8 array and scales stands wherever a float one did.

`Quantized` is a pytree node with the shape of the kernel, so modules, scans and meshes treat it as a parameter. Weights
are widened to the inputs' dtype on the way into a product (weight-only quantization, symmetric, one scale an output).

D width in   F width out   V tokens
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int8

from flax_vlm.layers import few_rows
from flax_vlm.layers.param_tree import flatten_params, unflatten_params

LARGEST = 127  # -128 is left out, so that zero is in the middle
BLOCK = 256  # rows of weights that a CPU widens at a time: they stay in its cache


class Quantized(struct.PyTreeNode):
    """`values * scale`, not formed: a kernel with a scale for each output, or a table with one for each row."""

    values: Int8[Array, "*L D F"]  # first: linen compares the first leaf with the shape it expects
    scale: Float32[Array, "*L _ _"]  # [1, F] or [V, 1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def T(self) -> "Quantized":
        """Rows for columns: a table as the kernel of the head that is tied to it."""
        return Quantized(self.values.T, self.scale.T)

    def rows(self, ids: Int[Array, "*B"], dtype: Any) -> Float[Array, "*B D"]:
        """Those of a table; NaN for ids outside it."""
        values = self.values.at[ids].get(mode="fill", fill_value=0)
        scale = self.scale.at[ids].get(mode="fill", fill_value=jnp.nan)
        return (values * scale.astype(jnp.promote_types(dtype, jnp.float32))).astype(dtype)


def quantize(weights: Float[Array, "D F"], axis: int) -> Quantized:
    """The nearest int8 weights; one scale for each index that is left when the sums go over `axis`."""
    weights = weights.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weights), axis, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return Quantized(jnp.round(weights / scale).astype(jnp.int8), scale)


def product(inputs: Float[Array, "*B D"], kernel: Quantized) -> Float[Array, "*B F"]:
    """`inputs @ kernel`, the sums in float32 at least, in which it gives them."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    few = len(rows) <= few_rows.FEW and kernel.values.size >= few_rows.LARGE
    on_cpu = _of_few if few else _in_blocks
    out = lax.platform_dependent(rows, kernel.values, cpu=on_cpu, default=_widened)
    return (out * kernel.scale).reshape(*inputs.shape[:-1], -1)


def _widened(rows: Float[Array, "B D"], values: Int8[Array, "D F"]) -> Float[Array, "B F"]:
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.matmul(rows, values.astype(rows.dtype), preferred_element_type=wide)


def _of_few(rows: Float[Array, "B D"], values: Int8[Array, "D F"]) -> Float[Array, "B F"]:
    return few_rows.product(rows, values, lambda some: some.astype(jnp.float32))


def _in_blocks(rows: Float[Array, "B D"], values: Int8[Array, "D F"]) -> Float[Array, "B F"]:
    """Block by block of D: to write a widened copy of the weights would take longer than to read them."""
    if len(rows) == 1:
        rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))  # what a CPU multiplies one row by fastest
    blocks, width = divmod(len(values), BLOCK)

    def add(block: Any, total: Float[Array, "B F"]) -> Float[Array, "B F"]:
        ours = lax.dynamic_slice_in_dim(rows, block * BLOCK, BLOCK, 1)
        return total + _widened(ours, lax.dynamic_slice_in_dim(values, block * BLOCK, BLOCK, 0))

    rest = _widened(rows[:, len(values) - width :], values[len(values) - width :])
    return lax.fori_loop(0, blocks, add, rest) if blocks else rest


def summed_axis(path: str, shape: tuple[int, ...]) -> int | None:
    """The axis without scales of a parameter that is worth eight bits; None for the others.

    Kernels of products and tables of tokens take nearly all of the memory.
    """
    return _SUMMED.get(path.rsplit("/", 1)[-1]) if len(shape) == 2 else None


_SUMMED = {"kernel": 0, "embedding": 1}


def quantize_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, one entry a layer, with `Quantized` ones where they are worth it."""
    made = flatten_params(params)
    for path, leaf in made.items():
        axis = summed_axis(path, leaf.shape)
        made[path] = leaf if axis is None else quantize(leaf, axis)
    return unflatten_params(made)


def is_quantized(params: Any) -> bool:
    """Whether any of these parameters is `Quantized`."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return any(isinstance(leaf, Quantized) for leaf in leaves)
