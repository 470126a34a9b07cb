"""cuDNN's fused attention: on an NVIDIA GPU the scores are never held, forward or backward.

It is reached through `jax.nn.dot_product_attention`, which knows no mask but a causal one and lengths: what else may be
attended is added to the scores.

B batch   T queries   S keys   N query heads   K key/value heads   H head width
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def is_there() -> bool:
    """Whether programs are run on an NVIDIA GPU by default; the kernels cannot even be traced without cuDNN."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


def fault(query: Any, key: Any, bias: Any = None, causal: bool = False) -> str:
    """What `fused_attention` cannot serve; empty where it can."""
    num_queries, head_dim = query.shape[1], query.shape[3]
    if not is_there():
        return f"a program for {jax.default_backend()}, other than an NVIDIA GPU"
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"{query.dtype}, other than float16 and bfloat16"
    if head_dim % 8 or head_dim > 128:
        return f"a head width of {head_dim}: it takes multiples of 8 up to 128"
    if causal and num_queries != key.shape[1]:
        return f"a causal mask of {num_queries} queries and {key.shape[1]} keys"
    return "" if bias is None else "a bias"


def fused_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    allowed: Bool[Array, "#B #N #T _"] | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention over the keys that are allowed and, if `causal` (T = S), up to the query itself.

    A query that may attend nothing takes zero. `allowed` has a column for each key, or for as many keys in a row.
    """
    batch, num_queries = query.shape[:2]
    num_keys = key.shape[1]
    # For gradients the kernel takes only even numbers of queries and keys.
    query, key, value = _even(query, 1), _even(key, 1), _even(value, 1)
    run = functools.partial(
        jax.nn.dot_product_attention, query, key, value, scale=scale, is_causal=causal, implementation="cudnn"
    )
    if allowed is None:
        has_padding = key.shape[1] > num_keys and not causal  # causal padding is behind every token
        lengths = jnp.full(batch, num_keys, jnp.int32) if has_padding else None
        return run(key_value_seq_lengths=lengths)[:, :num_queries]

    mask = allowed.repeat(num_keys // allowed.shape[3], axis=3)
    mask = _even(_even(jnp.broadcast_to(mask, (*mask.shape[:2], num_queries, num_keys)), 2), 3)
    seen = mask & jnp.tri(*mask.shape[2:], dtype=bool) if causal else mask
    sees_any = seen.any(-1).swapaxes(1, 2)[..., None]  # [#B T #N 1]
    return jnp.where(sees_any, run(mask=mask), 0)[:, :num_queries]


def _even(array: Array, axis: int) -> Array:
    """With a zero behind an odd axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, array.shape[axis] % 2)
    return jnp.pad(array, widths)
