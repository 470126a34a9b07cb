"""Attention that holds the scores of a block of queries only, forward and backward, and on a CPU keeps all cores busy.

XLA's CPU code runs one batched product on a single core. So this goes over the rows of the batch and over blocks of
queries, one after the other, with the heads of each in a few products that do not wait for one another. Backward, each
block is computed again.

B batch   T queries   S keys   N query heads   K key/value heads   H head width
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flax_vlm.layers.linear import wide
from flax_vlm.layers.plain_attention import attend_plainly

# Scores of one block: small enough for a last-level cache share, large enough to keep the cores busy.
_BLOCK_SCORES = 2**23


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_in_blocks(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None, scale: float
) -> Array:
    """As `attend_plainly`, without weights; the arguments are those of `attend`."""
    batch, num_queries = query.shape[:2]
    block, num_blocks = _blocks(query, key)

    def attend_at(position: tuple[Array, Array], queries: Array) -> Array:
        row, start = position
        keys, values = (lax.dynamic_slice_in_dim(array, row, 1, 0) for array in (key, value))
        allowed, added = (_block_of(_row_of(array, row), start, block) for array in (mask, bias))
        return _attend_by_groups(queries, keys, values, allowed, added, scale)

    if batch * num_blocks == 1:
        return attend_at((jnp.int32(0), jnp.int32(0)), query)

    # A last, short block is moved back rather than read past the end: its first rows are computed twice.
    starts = [min(i * block, num_queries - block) for i in range(num_blocks)]
    rows, offsets = (grid.ravel() for grid in jnp.meshgrid(jnp.arange(batch), jnp.array(starts), indexing="ij"))

    def step(out: Array, position: tuple[Array, Array]) -> tuple[Array, None]:
        row, start = position
        queries = lax.dynamic_slice(query, (row, start, 0, 0), (1, block, *query.shape[2:]))
        return lax.dynamic_update_slice(out, attend_at(position, queries), (row, start, 0, 0)), None

    # Every row of the buffer is overwritten. It starts as the query, not as zeros (as that of lax.map would), so that
    # the buffers of all layers of an unrolled model are not made at its start and kept.
    return lax.scan(step, query, (rows, offsets))[0]


def _forward(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None, scale: float
) -> tuple[Array, tuple[Any, ...]]:
    return attend_in_blocks(query, key, value, mask, bias, scale), (query, key, value, mask, bias)


def _backward(scale: float, kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    query, key, value, mask, bias = kept
    if bias is not None:  # a table of relative positions, which only short texts have

        def plainly(query: Array, key: Array, value: Array, bias: Array) -> Array:
            return attend_plainly(query, key, value, mask, bias, scale)[0]

        of_query, of_key, of_value, of_bias = jax.vjp(plainly, query, key, value, bias)[1](cotangent)
        return of_query, of_key, of_value, None, of_bias

    block, num_blocks = _blocks(query, key)
    starts = jnp.arange(num_blocks) * block
    rest = num_blocks * block - query.shape[1]

    def padded(array: Array, axis: int) -> Array:
        """With further queries, of which nothing comes back."""
        if rest == 0 or array.shape[axis] == 1:
            return array
        return jnp.pad(array, [(0, rest if each == axis else 0) for each in range(array.ndim)])

    if mask is not None:
        mask = padded(mask, 2)

    def of_row(_: None, row: tuple[Array, ...]) -> tuple[None, tuple[Array, ...]]:
        index, (queries, cotangents, keys, values) = row[0], (array[None] for array in row[1:])
        row_mask = _row_of(mask, index)

        def of_block(sums: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], Array]:
            here = _block_of(row_mask, start, block)

            def attend_block(queries: Array, keys: Array, values: Array) -> Array:
                return _attend_by_groups(queries, keys, values, here, None, scale)

            taken, coming = (lax.dynamic_slice_in_dim(array, start, block, 1) for array in (queries, cotangents))
            of_queries, *others = jax.vjp(attend_block, taken, keys, values)[1](coming)
            of_keys, of_values = (total + one.astype(total.dtype) for total, one in zip(sums, others, strict=True))
            return (of_keys, of_values), of_queries[0]

        nothing = jnp.zeros(keys.shape, wide(keys.dtype))
        (of_keys, of_values), of_queries = lax.scan(of_block, (nothing, nothing), starts)
        of_queries = of_queries.reshape(-1, *of_queries.shape[2:])
        return None, (of_queries, of_keys[0].astype(keys.dtype), of_values[0].astype(values.dtype))

    rows = (jnp.arange(len(query)), padded(query, 1), padded(cotangent, 1), key, value)
    of_query, of_key, of_value = lax.scan(of_row, None, rows)[1]
    return of_query[:, : query.shape[1]], of_key, of_value, None, None


attend_in_blocks.defvjp(_forward, _backward)


def _attend_by_groups(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None, scale: float
) -> Array:
    """With the heads in as many independent products as the cores can use: the largest of 4, 3, 2, 1 that divides."""
    groups = next(groups for groups in (4, 3, 2, 1) if key.shape[2] % groups == 0)

    heads = [(array, array.shape[2] // groups) for array in (query, key, value)]

    def of_group(array: Array | None, index: int) -> Array | None:
        """Of a mask or bias; one head serves all groups."""
        if array is None or array.shape[1] == 1:
            return array
        size = array.shape[1] // groups
        return lax.slice_in_dim(array, index * size, (index + 1) * size, axis=1)

    def attend_group(index: int) -> Array:
        queries, keys, values = (
            lax.slice_in_dim(array, index * size, (index + 1) * size, axis=2) for array, size in heads
        )
        return attend_plainly(queries, keys, values, of_group(mask, index), of_group(bias, index), scale)[0]

    return jnp.concatenate([attend_group(index) for index in range(groups)], axis=2)


def _blocks(query: Array, key: Array) -> tuple[int, int]:
    """Queries of a block, and how many blocks a row has."""
    num_queries, num_heads = query.shape[1:3]
    block = max(1, min(num_queries, _BLOCK_SCORES // max(1, num_heads * key.shape[1])))
    return block, math.ceil(num_queries / block)


def _row_of(array: Array | None, row: Array) -> Array | None:
    """The row of a mask or bias [#B #N #T S]."""
    return array if array is None or array.shape[0] == 1 else lax.dynamic_slice_in_dim(array, row, 1, 0)


def _block_of(array: Array | None, start: Array, block: int) -> Array | None:
    """The queries from `start` of a mask or bias."""
    return array if array is None or array.shape[2] == 1 else lax.dynamic_slice_in_dim(array, start, block, 2)
