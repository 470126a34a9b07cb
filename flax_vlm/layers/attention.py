"""attend(): the one place that picks an attention kernel, and the builders of its masks.

B batch   T queries   S keys   N query heads   K key/value heads (N = K * G)   H head width

Masks say which key a query may attend. A `Mask` holds what it is made of and is written out, True = may attend, only
where scores are; plain arrays that broadcast to [B, N, T, S] serve too:

    causal, T = S = 3      padding, row of 2 tokens + 1 pad      cached, 1 new token in slot 2 of 4
        1 0 0                  1 1 0                                 1 1 1 0
        1 1 0                  1 1 0
        1 1 1                  1 1 0

A query that may attend nothing takes exactly zero, forward and backward, never NaN.
"""

import functools
import operator
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flax_vlm.layers import cudnn
from flax_vlm.layers.blocked_attention import attend_in_blocks
from flax_vlm.layers.partitioning import HEADS, constrain
from flax_vlm.layers.per_device import per_device
from flax_vlm.layers.plain_attention import attend_plainly
from flax_vlm.layers.splash import LANES, Segments, splash

Implementation: TypeAlias = Literal["auto", "xla", "blocked", "splash", "cudnn"]
Allowed: TypeAlias = Bool[Array, "#B #N #T _"]  # S columns, or a divisor of S

ATTENDED = "attended"  # the name of the result, by which `layers.stack` keeps it for the backward pass
# The kernel is made by going over them in Python.
_SPLASH_HEADS = 1024
# Below this many scores the loop of "blocked" costs more than it saves.
_SMALL = 2**16


class Mask(struct.PyTreeNode):
    """What may be attended: what all parts allow. `&` joins masks, and masks with arrays.

    Attributes:
      allowed: written out, or as far as it is the same for all rows, heads or queries.
      segments: a number for each token of T = S; it attends tokens of its own number only, and 0 (padding) nothing.
      causal: query t attends the keys up to t.
    """

    allowed: Allowed | None = None
    segments: Int[Array, "B T"] | None = None
    causal: bool = struct.field(pytree_node=False, default=False)

    def __and__(self, other: "Mask | Array") -> "Mask":
        if not isinstance(other, Mask):
            other = Mask(other)
        if self.segments is not None and other.segments is not None:
            other = Mask(other.written_out(*2 * other.segments.shape[1:]))
        parts = [part for part in (self.allowed, other.allowed) if part is not None]
        return Mask(
            functools.reduce(operator.and_, parts) if parts else None,
            other.segments if self.segments is None else self.segments,
            self.causal or other.causal,
        )

    __rand__ = __and__

    def written_out(self, num_queries: int, num_keys: int) -> Allowed | None:
        """As one array; None where everything is allowed."""
        parts = [] if self.allowed is None else [self.allowed]
        if self.causal:
            parts.append(jnp.tri(num_queries, num_keys, dtype=bool)[None, None])
        if self.segments is not None:
            own = self.segments[:, None]
            parts.append((own[..., None] == own[:, :, None]) & (own != 0)[..., None])
        return functools.reduce(operator.and_, parts) if parts else None


def causal_mask(num_queries: int, num_keys: int, offset: int | Int[Array, ""] = 0) -> Mask:
    """Query t sits at key slot `offset + t` and attends the slots up to its own."""
    if isinstance(offset, int) and offset == 0:
        return Mask(causal=True)
    slots = jnp.arange(num_queries)[:, None] + offset
    return Mask((jnp.arange(num_keys) <= slots)[None, None])


def padding_mask(attention_mask: Array) -> Mask:
    """[B, S] (1 = token, 0 = padding) or [B, T, S] (one row per query), of any dtype.

    Raises:
      ValueError: for any other number of axes.
    """
    if attention_mask.ndim == 2:
        return Mask((attention_mask != 0)[:, None, None, :])
    if attention_mask.ndim == 3:
        return Mask((attention_mask != 0)[:, None])
    raise ValueError(
        f"attention_mask has shape {attention_mask.shape}: expected [batch, keys] or [batch, queries, keys]"
    )


def segment_mask(segment_ids: Int[Array, "B T"]) -> Mask:
    """Documents packed in a row, numbered from 1 on: each token attends its own document, and padding (0) nothing."""
    return Mask(segments=segment_ids)


def length_mask(lengths: Int[Array, " B"], num_keys: int) -> Mask:
    """Row b attends its first `lengths[b]` keys."""
    return Mask((jnp.arange(num_keys) < lengths[:, None])[:, None, None, :])


def combine_masks(*masks: Mask | None) -> Mask | None:
    """What every given mask allows; None where none is given."""
    given = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, given) if given else None


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: Mask | Allowed | None = None,
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
        CPU all cores (XLA runs one batched product on a single core); "splash" is a kernel that never holds the
        scores (off a TPU it is interpreted, slowly); so is "cudnn", of NVIDIA's GPUs. "auto" takes "splash" on a TPU
        and "cudnn" on a GPU where they can serve, "blocked" on a CPU where there is enough work, and on other devices
        where the scores would pass 2 GiB.

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
    if implementation not in get_args(Implementation):
        known = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"unknown attention implementation {implementation!r}: expected one of {known}")

    query, key, value = (constrain(array, HEADS) for array in (query, key, value))
    whole = Mask(causal=causal)
    if mask is not None:
        whole &= mask
    if key_value_lengths is not None:
        whole &= length_mask(key_value_lengths, num_keys)
    if whole.allowed is not None and num_keys % max(1, whole.allowed.shape[-1]):
        raise ValueError(f"mask has shape {whole.allowed.shape}: its last axis does not divide {num_keys} keys evenly")
    factor = head_dim**-0.5 if scale is None else scale
    if return_weights or (dropout_rate > 0 and dropout_rng is not None):
        if implementation not in ("auto", "xla"):
            raise ValueError(
                "attention weights and their dropout exist in implementation 'xla' only: ask for it or 'auto'"
            )
        rng = dropout_rng if dropout_rate > 0 else None
        allowed = whole.written_out(num_queries, num_keys)
        attended, weights = attend_plainly(query, key, value, allowed, bias, factor, dropout_rate, rng)
        return checkpoint_name(attended, ATTENDED), weights

    faults = {
        "splash": _splash_fault(query, key, whole, bias),
        "cudnn": cudnn.fault(query, key, bias, whole.causal),
    }
    if faults.get(implementation):
        raise ValueError(
            f"attention implementation {implementation!r} cannot serve {faults[implementation]}: "
            "ask for another or 'auto'"
        )
    is_small = batch * num_heads * num_queries * num_keys <= _SMALL
    if implementation == "xla" or (is_small and implementation not in faults):
        attended, _ = attend_plainly(query, key, value, whole.written_out(num_queries, num_keys), bias, factor)
    else:
        serving = tuple(name for name, fault in faults.items() if not fault)
        choose = functools.partial(_attend_by, implementation, factor, serving)
        attended = per_device(choose, query, key, value, whole, bias)
    return checkpoint_name(attended, ATTENDED), None


def _attend_by(
    implementation: Implementation,
    scale: float,
    serving: tuple[str, ...],
    query: Array,
    key: Array,
    value: Array,
    mask: Mask,
    bias: Array | None,
) -> Array:
    """One of the implementations, for what one device holds."""
    batch, num_queries, num_heads, _ = query.shape
    num_keys = key.shape[1]
    allowed = mask.written_out(num_queries, num_keys)

    def xla(query: Array, key: Array, value: Array) -> Array:
        return attend_plainly(query, key, value, allowed, bias, scale)[0]

    def blocked(query: Array, key: Array, value: Array) -> Array:
        return attend_in_blocks(query, key, value, allowed, bias, scale)

    def on_tpu(query: Array, key: Array, value: Array) -> Array:
        return _attend_splash(query, key, value, mask, scale)

    def interpreted(query: Array, key: Array, value: Array) -> Array:
        return _attend_splash(query, key, value, mask, scale, interpret=True)

    def on_cuda(query: Array, key: Array, value: Array) -> Array:
        rest = mask.replace(causal=False).written_out(num_queries, num_keys)
        return cudnn.fused_attention(query, key, value, rest, scale=scale, causal=mask.causal)

    # Decided when the program is lowered, so that a program compiled here for another device is right too.
    if implementation == "splash":
        return lax.platform_dependent(query, key, value, tpu=on_tpu, default=interpreted)
    if implementation == "cudnn":
        return on_cuda(query, key, value)
    if implementation == "blocked":
        return blocked(query, key, value)
    kernels: dict[str, Callable[..., Array]] = {}
    if min(num_queries, num_keys) >= LANES:
        kernels |= {"tpu": on_tpu} if "splash" in serving else {}
        kernels |= {"cuda": on_cuda} if "cudnn" in serving else {}
    others = blocked if 4 * batch * num_heads * num_queries * num_keys > 2**31 else xla
    return lax.platform_dependent(query, key, value, cpu=blocked, default=others, **kernels)


def _splash_fault(query: Array, key: Array, mask: Mask, bias: Array | None) -> str:
    """What `_attend_splash` cannot serve; empty where it can."""
    if bias is not None:
        return "a bias"
    if query.shape[2] > _SPLASH_HEADS:
        return f"{query.shape[2]} heads"
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{query.dtype}, other than float32 and bfloat16"
    if mask.causal and query.shape[1] != key.shape[1]:
        return f"a causal mask of {query.shape[1]} queries and {key.shape[1]} keys"
    if mask.allowed is None or mask.allowed.shape[1:3] == (1, 1):
        return ""
    if mask.allowed.shape[1] > 1:
        return "a mask that differs between heads"
    is_of_images = mask.allowed.shape[3] < key.shape[1] and not mask.causal and mask.segments is None
    return "" if is_of_images else "a mask, already written out, that differs between queries"


def _attend_splash(query: Array, key: Array, value: Array, mask: Mask, scale: float, interpret: bool = False) -> Array:
    """The kernel, with the mask put as segments."""
    run = functools.partial(splash, scale=scale, causal=mask.causal, interpret=interpret)
    if mask.allowed is None and mask.segments is None:
        return run(query, key, value)
    batch, num_queries = query.shape[:2]
    num_keys = key.shape[1]
    if mask.allowed is not None and mask.allowed.shape[2] > 1:
        images = jnp.broadcast_to(mask.allowed[:, 0], (batch, num_queries, mask.allowed.shape[3]))
        seen = jnp.where(images.any(-1), images.argmax(-1), -1)
        of_images = jnp.arange(images.shape[2]).repeat(num_keys // images.shape[2])
        segments = Segments(seen, jnp.broadcast_to(of_images, (batch, num_keys)))
        # A token that looks at several images is in several segments at once, which the kernel does not know. Prompts
        # of IDEFICS' processor have none. (The checkpoint keeps what only the other branch would remember from being
        # made in this one too.)
        several = jax.checkpoint(lambda *arrays: attend_in_blocks(*arrays, mask.allowed, None, scale))
        one_at_most = (images.sum(-1) <= 1).all()
        return lax.cond(one_at_most, functools.partial(run, segments=segments), several, query, key, value)

    own = jnp.zeros((batch, num_queries), jnp.int32)
    if mask.segments is not None:
        own = jnp.where(mask.segments == 0, -1, mask.segments)
    of_keys = own if mask.segments is not None else jnp.zeros((batch, num_keys), jnp.int32)
    if mask.allowed is not None:
        keys = mask.allowed[:, 0, 0].repeat(num_keys // mask.allowed.shape[3], axis=-1)
        of_keys = jnp.where(keys, of_keys, -1)
    return run(query, key, value, segments=Segments(own, of_keys))
