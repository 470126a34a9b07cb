"""Attention with all scores at once.

B batch   T queries   S keys   N query heads   K key/value heads (N = K * G)   H head width
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flax_vlm.layers.linear import product, wide


def attend_plainly(
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
    scores = product(grouped, key, (((4,), (3,)), heads)) * scale
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
    attended = product(weights, value, (((4,), (1,)), ((0, 1), (0, 2))))
    attended = attended.swapaxes(1, 2).reshape(query.shape).astype(query.dtype)
    return attended, weights.swapaxes(2, 3).reshape(batch, num_heads, num_queries, num_keys)


def _by_group(array: Array, group: int) -> Array:
    """A mask or bias [#B #N #T S] as [#B #K #T #G S]."""
    batch, num_heads, num_queries, num_keys = array.shape
    if num_heads == 1:
        return array[:, :, :, None]
    return array.reshape(batch, num_heads // max(1, group), group, num_queries, num_keys).swapaxes(2, 3)
