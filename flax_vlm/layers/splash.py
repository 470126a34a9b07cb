"""Splash attention: softmax attention on a TPU without ever holding its scores, forward or backward.

It is the kernel of `jax.experimental.pallas.ops.tpu.splash_attention` (after FlashAttention, arXiv:2205.14135), which
skips blocks that a causal mask rules out. What else may be attended is said by segments: a query attends the keys that
have its number.

B batch   T queries   S keys   N query heads   K key/value heads   H head width
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jaxtyping import Array, Float, Int

from flax_vlm.layers.linear import wide

LANES = 128  # of a TPU's vector unit: blocks are multiples of it
_BLOCKS = (512, 384, 256)  # queries or keys at a time; larger ones are faster, smaller ones may need less padding
# Numbers of segments that nothing else has: of padding, and of what may not be attended.
_PADDING = -2


class Segments(NamedTuple):
    """Numbers from 0 on. A query with -1 attends nothing, a key with -1 is attended by nothing."""

    query: Int[Array, "B T"]
    key: Int[Array, "B S"]


# Compiled by itself, so that the layers of a model share what tracing the kernels takes (a tenth of a second each).
@functools.partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    scale: float,
    causal: bool = False,
    segments: Segments | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention over the keys of a query's own segment and, if `causal` (T = S), up to itself.

    Args:
      interpret: run without a TPU, slowly, for tests.
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    query_block, key_block = _block(num_queries), _block(num_keys)
    # The kernel has no scale: the queries take it, rounded once more.
    query = (query.astype(wide(query.dtype)) * scale).astype(query.dtype)
    heads_first = [
        _pad(array.swapaxes(1, 2), 2, block)
        for array, block in ((query, query_block), (key, key_block), (value, key_block))
    ]

    sees_any = None
    if segments is not None:
        sees_any = _sees_any(segments, causal)
    elif num_keys % key_block and not causal:  # causal padding is behind every token
        batch = len(query)
        segments = Segments(jnp.zeros((batch, num_queries), jnp.int32), jnp.zeros((batch, num_keys), jnp.int32))
    ids = None
    if segments is not None:
        padded = (_pad(each, 1, size, _PADDING) for each, size in zip(segments, (query_block, key_block), strict=True))
        ids = kernels.SegmentIds(*padded)
    attended = _kernel(causal, (query_block, key_block), interpret, *heads_first, ids)
    attended = attended[:, :, :num_queries].swapaxes(1, 2)
    if sees_any is None:
        return attended
    return jnp.where(sees_any[:, :, None, None], attended, 0)  # the kernel averages what such a row may not see


def _run(
    causal: bool,
    blocks: tuple[int, int],
    interpret: bool,
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    ids: Any,
) -> Float[Array, "B N T H"]:
    """The kernel itself."""
    mask = (kernels.CausalMask if causal else kernels.FullMask)((query.shape[2], key.shape[2]))
    kernel: Any = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=_block_sizes(*blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    with _precision(query):
        return jax.vmap(kernel)(query, key, value, *([] if ids is None else [ids]))


def _precision(array: Array) -> Any:
    """That of products. Those of bfloat16 are exact in float32; asked for more than that (as everything is, where
    `jax_default_matmul_precision` is "highest") the kernel does not compile."""
    return jax.default_matmul_precision("default") if array.dtype == jnp.bfloat16 else contextlib.nullcontext()


def _forward(
    causal: bool, blocks: tuple[int, int], interpret: bool, query: Array, key: Array, value: Array, ids: Any
) -> tuple[Array, Any]:
    def run(query: Array, key: Array, value: Array) -> Array:
        return _run(causal, blocks, interpret, query, key, value, ids)

    with _precision(query):
        return jax.vjp(run, query, key, value)


def _backward(causal: bool, blocks: tuple[int, int], interpret: bool, pull: Any, cotangent: Array) -> tuple[Any, ...]:
    with _precision(cotangent):
        return *pull(cotangent), None


# With the kernel's own gradients, which are traced later, in the same precision.
_kernel = jax.custom_vjp(_run, nondiff_argnums=(0, 1, 2))
_kernel.defvjp(_forward, _backward)


def _sees_any(segments: Segments, causal: bool) -> Array:
    """Which queries have a key to attend, [B, T]."""
    same = (segments.query[:, :, None] == segments.key[:, None]) & (segments.query >= 0)[:, :, None]
    if causal:
        same &= jnp.tri(*same.shape[1:], dtype=bool)
    return same.any(-1)


def _block(length: int) -> int:
    """The block that pads `length` the least, the largest of such."""
    if length <= LANES:
        return LANES
    return min(_BLOCKS, key=lambda block: (-(-length // block) * block, -block))


def _pad(array: Array, axis: int, block: int, fill: int = 0) -> Array:
    """Up to a multiple of `block`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, widths, constant_values=fill)


def _block_sizes(query: int, key: int) -> kernels.BlockSizes:
    return kernels.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=key,
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=key,
        block_q_dq=query,
        block_kv_dq=key,
    )
