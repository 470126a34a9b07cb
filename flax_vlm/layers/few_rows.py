"""A row or two times narrow weights on a CPU, as a decode loop of one or two answers multiplies them.

XLA makes one loop of a sum of rows of int8: it widens them where it multiplies them, and stores them nowhere. Of
bfloat16 it first makes a float32 copy of all the weights, for any operation but a product, and products of few rows are
slow. So a decode loop is given the bits of its kernels: the same memory under the name of a whole number.

B rows   D width in   F width out
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Integer, UInt16

from flax_vlm.layers.param_tree import flatten_params, unflatten_params

FEW = 2
LARGE = 1 << 18  # weights: of fewer, what is gained is less than it takes to compile
UNROLLED = 32  # rows of weights that are added up in one pass


class Bits(struct.PyTreeNode):
    """A kernel of bfloat16, as whole numbers of 16 bits."""

    values: UInt16[Array, "D F"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def floats(self) -> BFloat16[Array, "D F"]:
        return lax.bitcast_convert_type(self.values, jnp.bfloat16)

    def product(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """`inputs @ kernel`, the sums in float32 at least, in which it gives them."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        return product(rows, self.values, _as_float32).reshape(*inputs.shape[:-1], -1)


def _as_float32(bits: UInt16[Array, "_ F"]) -> Float32[Array, "_ F"]:
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def product(
    rows: Float[Array, "B D"],
    weights: Integer[Array, "D F"],
    as_floats: Callable[[Integer[Array, "_ F"]], Float[Array, "_ F"]],
) -> Float[Array, "B F"]:
    """`rows @ as_floats(weights)`, the sums in float32 at least, in which it gives them."""
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    passes, rest = divmod(len(weights), UNROLLED)

    def add(start: Any, count: int, total: Float[Array, "B F"]) -> Float[Array, "B F"]:
        start = jnp.uint32(start)  # of a number that may be negative, what it counts from is looked for each time
        ours = lax.dynamic_slice_in_dim(rows, start, count, 1)
        for i in range(count):
            theirs = as_floats(lax.dynamic_index_in_dim(weights, start + i, 0))
            total += ours[:, i : i + 1] * theirs.astype(rows.dtype)
        return total

    total = add(passes * UNROLLED, rest, jnp.zeros((len(rows), weights.shape[1]), rows.dtype))
    return lax.fori_loop(0, passes, lambda i, total: add(i * UNROLLED, UNROLLED, total), total) if passes else total


def for_few_rows(params: Any, rows: int) -> Any:
    """`params` to multiply so many rows by: on one CPU with `Bits`, which share their memory, for large kernels."""
    if rows > FEW:
        return params
    return unflatten_params({path: _bits(path, leaf) for path, leaf in flatten_params(params).items()})


def _bits(path: str, leaf: Any) -> Any:
    large = isinstance(leaf, jax.Array) and leaf.ndim == 2 and leaf.size >= LARGE
    if not large or leaf.dtype != jnp.bfloat16 or not path.endswith("/kernel"):
        return leaf
    (device, *others) = leaf.devices()
    if others or device.platform != "cpu":
        return leaf
    return Bits(jax.device_put(np.asarray(leaf).view(np.uint16), device))
