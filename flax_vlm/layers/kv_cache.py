"""The key/value cache and its contract.

- It is allocated once, to its full length, and every call fills the next slots of all rows with one
  `dynamic_update_slice`: rows share one write index, so prompts of different length are padded on the left.
- Slots hold keys as the attention uses them (after rotary, before heads are shared among groups).
- It remembers which slots may be attended, so a call brings the attention mask of its new tokens only.
- Cross-attention keys and values are computed by the call that brings the other states (an encoder's, an image's),
  and kept in `cross`; until then it is None.
- The next position of a row is the number of its open slots, unless `positions` counts them: an image may take more
  slots than positions.
- One entry a layer, so that an unrolled decode step updates each buffer in place (donate the cache).

B batch   S slots   E encoder tokens   K key/value heads   H head width
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from flax_vlm.layers.attention import Mask, causal_mask
from flax_vlm.layers.partitioning import HEADS, constrain


class KeyValue(struct.PyTreeNode):
    """Keys and values of one layer."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]

    def write(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], index: int | Int[Array, ""]
    ) -> KeyValue:
        """These buffers with `key` and `value` in the slots from `index` on."""

        def put(buffer: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), index, axis=1)

        return KeyValue(put(self.key, key), put(self.value, value))


class KVCache(struct.PyTreeNode):
    """What a decoder remembers between calls; see the module docstring for its contract."""

    layers: tuple[KeyValue, ...]
    may_attend: Bool[Array, "B S"]
    index: Int[Array, ""]
    cross: tuple[KeyValue, ...] | None = None
    cross_mask: Bool[Array, "B E"] | None = None
    positions: Int[Array, " B"] | None = None

    @classmethod
    def create(
        cls,
        batch_size: int,
        length: int,
        num_kv_heads: Sequence[int],
        head_dim: int,
        dtype: Dtype = jnp.float32,
    ) -> KVCache:
        """An empty cache of `length` slots; `num_kv_heads` names one number a layer."""

        def zeros(heads: int) -> Array:
            return constrain(jnp.zeros((batch_size, length, heads, head_dim), dtype), HEADS)

        return cls(
            layers=tuple(KeyValue(zeros(heads), zeros(heads)) for heads in num_kv_heads),
            may_attend=jnp.zeros((batch_size, length), bool),
            index=jnp.int32(0),
        )

    @property
    def next_position(self) -> Int[Array, " B"]:
        """Of each row's next token."""
        return self.may_attend.sum(-1) if self.positions is None else self.positions

    @property
    def length(self) -> int:
        """Slots in all."""
        return self.may_attend.shape[1]

    def admit(self, may_attend: Bool[Array, "B T"]) -> KVCache:
        """This cache with T new slots opened to attention where `may_attend`; the index still points at the first.

        Raises:
          ValueError: when the slots are known not to suffice (inside jit the index is unknown: check before a loop).
        """
        new_tokens = may_attend.shape[1]
        used = 0 if isinstance(self.index, Tracer) else int(self.index)
        if used + new_tokens > self.length:
            raise ValueError(
                f"the cache has {self.length} slots, {used} of them used: {new_tokens} new tokens do not fit. "
                "Create it with a larger length"
            )
        opened = lax.dynamic_update_slice_in_dim(self.may_attend, may_attend, self.index, axis=1)
        return self.replace(may_attend=opened)

    def mask(self, num_queries: int) -> Mask:
        """What the queries in the slots from `index` on may attend: open slots up to their own, [B, 1, T, S]."""
        return causal_mask(num_queries, self.length, self.index) & self.may_attend[:, None, None, :]

    def rows(self, indices: Int[Array, " N"]) -> KVCache:
        """The cache of a batch that is made of these rows of this one: `[0, 0, 1, 1]` has each of two twice."""
        return jax.tree.map(lambda leaf: leaf[indices] if leaf.ndim else leaf, self)

    def reorder(self, indices: Int[Array, " B"], start: int | Int[Array, ""], length: int) -> KVCache:
        """`rows` for rows that differ in `length` slots from `start` on only, like beams of one prompt behind it."""

        def move(leaf: Array) -> Array:
            new = lax.dynamic_slice_in_dim(leaf, start, length, axis=1)[indices]
            return lax.dynamic_update_slice_in_dim(leaf, new, start, axis=1)

        return self.replace(layers=jax.tree.map(move, self.layers))

    def rewind(self, index: int, positions: Int[Array, " B"] | None = None) -> KVCache:
        """As before the slots from `index` on were written; a cache that counts positions is told the next ones."""
        return self.replace(
            may_attend=self.may_attend & (jnp.arange(self.length) < index),
            index=jnp.int32(index),
            positions=None if self.positions is None else positions,
        )

    def advance(self, num_tokens: int, layers: Sequence[KeyValue]) -> KVCache:
        """After a call: the layers as written, the index past the new tokens."""
        return self.replace(layers=tuple(layers), index=self.index + num_tokens)
