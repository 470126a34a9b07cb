"""attend(): the one place that picks an attention kernel, and the builders of its masks.

B batch   T queries   S keys   N query heads   K key/value heads (N = K * G)   H head width

Masks are boolean, True = may attend, and broadcast to [B, N, T, S]:

    causal, T = S = 3      padding, row of 2 tokens + 1 pad      cached, 1 new token in slot 2 of 4
        1 0 0                  1 1 0                                 1 1 1 0
        1 1 0                  1 1 0
        1 1 1                  1 1 0

A query that may attend nothing takes exactly zero, forward and backward, never NaN.
"""

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flax_vlm.layers.linear import wide

Implementation: TypeAlias = Literal["auto", "xla", "blocked"]
Mask: TypeAlias = Bool[Array, "#B #N #T _"]  # S columns, or a divisor of S

# Scores of one block in `blocked`: small enough for a last-level cache share, large enough to keep the cores busy.
_BLOCK_SCORES = 2**23
# Below this many scores the loop of `blocked` costs more than it saves.
_SMALL = 2**16


def causal_mask(num_queries: int, num_keys: int, offset: int | Int[Array, ""] = 0) -> Bool[Array, "1 1 T S"]:
    """Query t sits at key slot `offset + t` and attends the slots up to its own."""
    slots = jnp.arange(num_queries)[:, None] + offset
    return (jnp.arange(num_keys) <= slots)[None, None]


def padding_mask(attention_mask: Array) -> Bool[Array, "B 1 #T S"]:
    """[B, S] (1 = token, 0 = padding) or [B, T, S] (one row per query), of any dtype, as a mask of `attend`.

    Raises:
      ValueError: for any other number of axes.
    """
    if attention_mask.ndim == 2:
        return (attention_mask != 0)[:, None, None, :]
    if attention_mask.ndim == 3:
        return (attention_mask != 0)[:, None]
    raise ValueError(
        f"attention_mask has shape {attention_mask.shape}: expected [batch, keys] or [batch, queries, keys]"
    )


def length_mask(lengths: Int[Array, " B"], num_keys: int) -> Bool[Array, "B 1 1 S"]:
    """Row b attends its first `lengths[b]` keys."""
    return (jnp.arange(num_keys) < lengths[:, None])[:, None, None, :]


def combine_masks(*masks: Mask | None) -> Mask | None:
    """What every given mask allows; None where none is given."""
    combined = None
    for mask in masks:
        if mask is not None:
            combined = mask if combined is None else combined & mask
    return combined


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: Mask | None = None,
    causal: bool = False,
    key_value_lengths: Int[Array, " B"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | Array | None = None,
    return_weights: bool = False,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"] | None]:
    """Softmax attention (Vaswani et al., arXiv:1706.03762); query head j reads key/value head j // G.

    Args:
      mask, causal, key_value_lengths: what may be attended; all that are given must allow it. `causal` lines query t
        up with key t. A mask that stands alone may have fewer columns than there are keys: each then speaks for as
        many keys in a row (the tokens of one image, say), and is spread where the scores are, never before.
      bias: added to the scaled scores.
      scale: of the scores; H^-1/2 when None.
      dropout_rate, dropout_rng: dropout on the probabilities; off without a key.
      return_weights: also give the probabilities as they were used (after dropout).
      implementation: "xla" forms all scores at once; "blocked" goes over the rows of the batch and over blocks of
        queries, recomputing them in the backward pass, with the heads in independent groups: less memory, and on a
        CPU all cores (XLA runs one batched product on a single core). "auto" takes "blocked" on a CPU where there
        is enough work, and on other devices where the scores would pass 2 GiB.

    Returns:
      The attended values in the dtype of `query`, and the weights (or None).

    Raises:
      ValueError: for shapes that do not belong together, an unknown implementation, or one that cannot serve.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape}: expected [B T N H], 2 x [B S K H]"
        )
    if num_kv_heads and num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly")

    mask = combine_masks(
        mask,
        causal_mask(num_queries, num_keys) if causal else None,
        length_mask(key_value_lengths, num_keys) if key_value_lengths is not None else None,
    )
    if mask is not None and num_keys % max(1, mask.shape[-1]):
        raise ValueError(f"mask has shape {mask.shape}: its last axis does not divide {num_keys} keys evenly")
    factor = head_dim**-0.5 if scale is None else scale
    dropping = dropout_rate > 0 and dropout_rng is not None
    if implementation == "blocked" and (dropping or return_weights):
        raise ValueError("attention weights and their dropout exist in implementation 'xla' only: ask for it or 'auto'")
    if implementation not in ("auto", "xla", "blocked"):
        raise ValueError(f"unknown attention implementation {implementation!r}: expected 'auto', 'xla' or 'blocked'")

    if dropping or return_weights:
        return _attend_xla(query, key, value, mask, bias, factor, dropout_rate, dropout_rng if dropping else None)

    def xla(query: Array, key: Array, value: Array) -> Array:
        return _attend_xla(query, key, value, mask, bias, factor)[0]

    def blocked(query: Array, key: Array, value: Array) -> Array:
        return _attend_blocked(query, key, value, mask, bias, factor)

    scores = batch * num_heads * num_queries * num_keys
    if implementation == "xla" or scores <= _SMALL:
        return xla(query, key, value), None
    if implementation == "blocked" or 4 * scores > 2**31:
        return blocked(query, key, value), None
    # Decided when the program is lowered, so that a program compiled here for another device is right too.
    return lax.platform_dependent(query, key, value, cpu=blocked, default=xla), None


def _attend_xla(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> tuple[Array, Array]:
    """All scores at once: ([B T N H], weights [B N T S]).

    Inside, the queries of a key/value head stand side by side, [B K T G S], and both products keep their operands as
    they lie in memory.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    group = num_heads // max(1, num_kv_heads)
    accumulate = wide(query.dtype)
    grouped = query.reshape(batch, num_queries, num_kv_heads, group, head_dim)
    heads = ((0, 2), (0, 2))
    scores = lax.dot_general(grouped, key, (((4,), (3,)), heads), preferred_element_type=accumulate) * scale
    if bias is not None:
        scores += _by_group(bias, group).astype(accumulate)
    if mask is not None:
        mask = _by_group(mask, group)
        spread = jnp.repeat(mask, num_keys // max(1, mask.shape[-1]), axis=-1)
        scores = jnp.where(spread, scores, jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:  # a row that may attend nothing has become uniform
        weights = jnp.where(mask.any(-1, keepdims=True), weights, 0)
    if dropout_rng is not None:
        keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    weights = weights.astype(query.dtype)
    attended = lax.dot_general(weights, value, (((4,), (1,)), ((0, 1), (0, 2))), preferred_element_type=accumulate)
    attended = attended.swapaxes(1, 2).reshape(query.shape).astype(query.dtype)
    return attended, weights.swapaxes(2, 3).reshape(batch, num_heads, num_queries, num_keys)


def _by_group(array: Array, group: int) -> Array:
    """A mask or bias [#B #N #T S] as [#B #K #T #G S]."""
    batch, num_heads, num_queries, num_keys = array.shape
    if num_heads == 1:
        return array[:, :, :, None]
    return array.reshape(batch, num_heads // max(1, group), group, num_queries, num_keys).swapaxes(2, 3)


def _attend_blocked(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None, scale: float
) -> Array:
    """One row of the batch, and one block of its queries, at a time; heads in independent groups."""
    batch, num_queries, num_heads, _ = query.shape
    num_keys = key.shape[1]
    block = max(1, min(num_queries, _BLOCK_SCORES // max(1, num_heads * num_keys)))
    num_blocks = math.ceil(num_queries / block)
    groups = _head_groups(key.shape[2])

    def take(array: Array | None, row: Array, start: Array) -> Array | None:
        """The block of a mask or bias [#B #N #T S] that belongs to a row and to the queries from `start`."""
        if array is None:
            return None
        if array.shape[0] > 1:
            array = lax.dynamic_slice_in_dim(array, row, 1, 0)
        if array.shape[2] > 1:
            array = lax.dynamic_slice_in_dim(array, start, block, 2)
        return array

    def attend_block(position: tuple[Array, Array], queries: Array) -> Array:
        row, start = position
        keys, values = (lax.dynamic_slice_in_dim(array, row, 1, 0) for array in (key, value))
        row_mask, row_bias = take(mask, row, start), take(bias, row, start)
        outs = []
        for group in range(groups):
            q, k, v = (_group(array, group, groups, 2) for array in (queries, keys, values))
            m, b = (None if array is None else _group(array, group, groups, 1) for array in (row_mask, row_bias))
            outs.append(_attend_xla(q, k, v, m, b, scale)[0])
        return jnp.concatenate(outs, axis=2)

    attend_block = jax.checkpoint(attend_block) if num_blocks > 1 else attend_block
    if batch * num_blocks == 1:
        return attend_block((jnp.int32(0), jnp.int32(0)), query)

    # A last, short block is moved back rather than read past the end: its first rows are computed twice.
    starts = [min(i * block, num_queries - block) for i in range(num_blocks)]
    rows, offsets = (grid.ravel() for grid in jnp.meshgrid(jnp.arange(batch), jnp.array(starts), indexing="ij"))

    def attend_at(out: Array, position: tuple[Array, Array]) -> tuple[Array, None]:
        row, start = position
        queries = lax.dynamic_slice(query, (row, start, 0, 0), (1, block, *query.shape[2:]))
        return lax.dynamic_update_slice(out, attend_block(position, queries), (row, start, 0, 0)), None

    # Every row of the buffer is overwritten. It starts as the query, not as zeros (as that of lax.map would), so that
    # the buffers of all layers of an unrolled model are not made at its start and kept.
    return lax.scan(attend_at, query, (rows, offsets))[0]


def _group(array: Array, index: int, groups: int, axis: int) -> Array:
    """Group `index` of the heads on `axis`; an axis of one head serves all groups."""
    if array.shape[axis] == 1 or groups == 1:
        return array
    size = array.shape[axis] // groups
    return lax.slice_in_dim(array, index * size, (index + 1) * size, axis=axis)


def _head_groups(num_kv_heads: int) -> int:
    """How many independent products to offer the cores: the largest of 4, 3, 2, 1 that divides the heads."""
    return next(groups for groups in (4, 3, 2, 1) if num_kv_heads % groups == 0)
