"""The loss of language models: cross-entropy of the next token, from logits, or from states a few words at a time.

Logits of all words, [B, T, V], are the largest array of a training step. `next_token_sums_in_chunks` never makes them:
forward it adds up the logsumexp over chunks of words, backward it computes each chunk again.

B batch   T tokens   D model width   V vocabulary   G parts of it (its devices), of L words each   C words of a chunk
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from flax_vlm.layers.linear import wide
from flax_vlm.layers.partitioning import constrain, ways

IGNORED = -100  # a label that does not count

Sums: TypeAlias = tuple[Float[Array, ""], Float[Array, ""]]  # of the losses, and how many they are


def next_token_sums(
    logits: Float[Array, "B T V"],
    labels: Int[Array, "B T"],
    attention_mask: Num[Array, "B T"] | Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Sums:
    """Cross-entropy of token t + 1 under the logits at t, in at least float32: the sum, and over how many positions.

    A position counts where its next label is not -100, its next token is no padding, and that is of its own segment.
    """
    targets, counts = _next_tokens(labels, attention_mask, segment_ids)
    log_probs = jax.nn.log_softmax(logits.astype(wide(logits.dtype)), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return _sums(picked, counts)


def next_token_sums_in_chunks(
    states: Float[Array, "B T D"],
    tables: Sequence[Float[Array, "_ _"]],
    labels: Int[Array, "B T"],
    attention_mask: Num[Array, "B T"] | Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    chunk: int,
    words_first: bool = False,
) -> Sums:
    """`next_token_sums` of the logits that `tables` make of `states`, without these logits.

    Args:
      tables: kernels [D, V], whose words follow one another.
      chunk: how many words at a time.
      words_first: the tables are [V, D], those of a tied embedding.
    """
    targets, counts = _next_tokens(labels, attention_mask, segment_ids)
    return _sums(_log_probs(states, tuple(tables), targets, chunk, words_first), counts)


def mean_loss(total: Float[Array, ""], count: Float[Array, ""]) -> Float[Array, ""]:
    """0 where nothing counts."""
    return total / jnp.maximum(count, 1)


def _next_tokens(labels: Array, attention_mask: Array | None, segment_ids: Array | None) -> tuple[Array, Array]:
    """What each position predicts, and whether it counts; the last one has nothing to predict."""

    def following(values: Array, last: int) -> Array:
        return jnp.pad(values[:, 1:], ((0, 0), (0, 1)), constant_values=last)

    targets = following(labels, IGNORED)
    counts = targets != IGNORED
    if attention_mask is not None:
        counts &= following(attention_mask != 0, 0)
    if segment_ids is not None:
        next_segment = following(segment_ids, 0)
        counts &= (next_segment != 0) & (next_segment == segment_ids)
    return jnp.where(counts, targets, 0), counts


def _sums(log_probs: Array, counts: Array) -> Sums:
    return -jnp.where(counts, log_probs, 0).sum(), counts.sum().astype(log_probs.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _log_probs(states: Array, tables: tuple[Array, ...], targets: Array, chunk: int, words_first: bool) -> Array:
    """[B, T]: the log-probability of each target; NaN for one outside the vocabulary."""
    return _forward(states, tables, targets, chunk, words_first)[0]


def _forward(
    states: Array, tables: tuple[Array, ...], targets: Array, chunk: int, words_first: bool
) -> tuple[Array, tuple[Any, ...]]:
    def add(words: _Words, carry: Any, start: Any, size: int) -> Any:
        lse, picked = carry
        logits = words.logits(states, words.take(start, size, states.dtype))
        lse = jnp.logaddexp(lse, jax.nn.logsumexp(logits, axis=-1))
        return lse, picked + jnp.where(words.are(targets, start, size), logits, 0).sum(-1)

    dtype = wide(states.dtype)
    lse, picked, number = jnp.full(targets.shape, -jnp.inf, dtype), jnp.zeros(targets.shape, dtype), 0
    for words in _vocabulary(tables, words_first):
        nothing = jnp.zeros((*targets.shape, words.parts), dtype)
        found = words.in_chunks(add, (nothing - jnp.inf, nothing), chunk)
        lse = jnp.logaddexp(lse, jax.nn.logsumexp(found[0], axis=-1))
        picked += found[1].sum(-1)
        number += words.number
    exists = (targets >= 0) & (targets < number)
    return jnp.where(exists, picked, jnp.nan) - lse, (states, tables, targets, lse)


def _backward(chunk: int, words_first: bool, kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    states, tables, targets, lse = kept
    dtype = wide(states.dtype)
    product = partial(jnp.einsum, preferred_element_type=dtype)

    def add(words: _Words, carry: Any, start: Any, size: int) -> Any:
        of_states, of_table = carry
        taken = words.take(start, size, states.dtype)
        probs = jnp.exp(words.logits(states, taken) - lse[..., None, None])
        of_logits = (words.are(targets, start, size) - probs) * cotangent[..., None, None]
        of_logits = of_logits.astype(states.dtype)  # as the gradient of plain logits is rounded
        of_states += product(f"btgc,{words.axes}->gbtd", of_logits, taken)
        return of_states, words.put(of_table, product(f"btgc,btd->{words.axes}", of_logits, states), start)

    of_states, of_tables = jnp.zeros(states.shape, dtype), []
    for table, words in zip(tables, _vocabulary(tables, words_first), strict=True):
        parts = constrain(jnp.zeros((words.parts, *states.shape), dtype), ("vocab", "batch", None, None))
        parts, of_table = words.in_chunks(add, (parts, words.zeros()), chunk)
        of_states += parts.sum(0)
        of_tables.append(of_table.reshape(table.shape))
    return of_states.astype(states.dtype), tuple(of_tables), None


_log_probs.defvjp(_forward, _backward)


class _Words:
    """A table whose first word has the id `first`, in G parts, of which a chunk takes as many words each.

    Where the vocabulary is split over devices, the parts are theirs: each of them takes part in every chunk, with words
    that it holds.
    """

    def __init__(self, table: Array, first: int, words_first: bool) -> None:
        self.table, self.first = table, first
        self.number, self.axes = (table.shape[0], "gcd") if words_first else (table.shape[1], "dgc")
        self.parts = _parts(self.number)
        self.each = self.number // self.parts
        sizes = {"g": self.parts, "c": self.each, "d": table.size // self.number}
        self.shape = tuple(sizes[axis] for axis in self.axes)

    def in_chunks(self, add: Callable[["_Words", Any, Any, int], Any], carry: Any, chunk: int) -> Any:
        """`carry = add(self, carry, start, size)` for all chunks; one of them may be smaller."""
        size = min(max(1, chunk // self.parts), self.each)
        chunks, rest = divmod(self.each, size)
        carry = add(self, carry, chunks * size, rest) if rest else carry
        return lax.scan(lambda carry, i: (add(self, carry, i * size, size), None), carry, jnp.arange(chunks))[0]

    def take(self, start: Any, size: int, dtype: Any) -> Array:
        """The words of a chunk, gathered once where their width is split over devices."""
        # Reshaped here, in the loop: XLA copies a table that is handed to a loop in another shape.
        taken = lax.dynamic_slice_in_dim(self.table.reshape(self.shape), start, size, self.axes.index("c"))
        return constrain(taken.astype(dtype), self._names(None))

    def zeros(self) -> Array:
        """For the gradient, split over devices as the table is."""
        return constrain(jnp.zeros(self.shape, self.table.dtype), self._names("embed"))

    def put(self, table: Array, words: Array, start: Any) -> Array:
        """`table`, of this shape, with these words of a chunk."""
        return lax.dynamic_update_slice_in_dim(table, words.astype(table.dtype), start, self.axes.index("c"))

    def logits(self, states: Array, taken: Array) -> Float[Array, "B T G C"]:
        logits = jnp.einsum(f"btd,{self.axes}->btgc", states, taken, preferred_element_type=wide(states.dtype))
        return constrain(logits, ("batch", None, "vocab", None))

    def are(self, targets: Array, start: Any, size: int) -> Bool[Array, "B T G C"]:
        """Which word of a chunk each target is."""
        ids = self.first + self.each * jnp.arange(self.parts)[:, None] + start + jnp.arange(size)
        return targets[..., None, None] == ids

    def _names(self, width: str | None) -> list[str | None]:
        names = {"g": "vocab", "c": None, "d": width}
        return [names[axis] for axis in self.axes]


def _vocabulary(tables: tuple[Array, ...], words_first: bool) -> list[_Words]:
    firsts = accumulate((table.shape[0 if words_first else 1] for table in tables), initial=0)
    return [_Words(table, first, words_first) for table, first in zip(tables, firsts, strict=False)]


def _parts(number: int) -> int:
    """In how many parts the rules in effect split a vocabulary of this size."""
    mesh, (axes,) = jax.sharding.get_abstract_mesh(), logical_to_mesh_axes(("vocab",)) or (None,)
    parts = 1 if mesh.empty else ways(mesh, axes)
    return parts if number % parts == 0 else 1
