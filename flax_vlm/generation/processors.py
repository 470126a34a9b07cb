"""From the logits of a step to the scores it chooses by, and the choice itself.

What is done and in which order is transformers' (5.23 `_get_logits_processor`): repetition penalty, repeated n-grams,
bad words, no early stop id; then, when sampling, temperature, top-k, top-p, min-p.

B rows   V vocabulary   S slots of the cache   E stop ids   W bad words   L tokens of the longest bad word
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

# In `History.tokens`, where no token of this call is: past the end of any vocabulary, so that scatters drop it.
NO_TOKEN = 2**31 - 1
_ANY_TOKEN = -1


class BadWords(struct.PyTreeNode):
    """Sequences that may not come."""

    prefixes: Int[Array, "W L-1"]  # right-aligned, _ANY_TOKEN in front of shorter ones
    lasts: Int[Array, " W"]


class Sampling(struct.PyTreeNode):
    """How to sample."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None


class BeamRules(struct.PyTreeNode):
    """What beams are worth, and when their search ends."""

    length_norms: Float[Array, " S+1"]  # n ** length_penalty
    stop_when_full: Bool[Array, ""]  # early_stopping=True
    hope_for_longest: Bool[Array, ""]  # early_stopping="never", with a penalty that favours length


class Options(struct.PyTreeNode):
    """The numbers of a GenerationConfig, traced: others run the same program. What is None is left out of it."""

    limit: Int[Array, ""]  # new tokens at most
    least: Int[Array, ""]  # ... and before a stop id
    stop_ids: Int[Array, " E"]
    fill_id: Int[Array, ""]
    repetition_penalty: Float[Array, ""] | None
    bad_words: BadWords | None
    stop_table: Int[Array, "_ V"] | None  # see stop_strings.py
    sampling: Sampling | None
    beams: BeamRules | None


class History(struct.PyTreeNode):
    """What has been written in this call, prompt and answer."""

    tokens: Int[Array, "B S"]  # by slot of the cache
    seen: Bool[Array, "B V"] | None = None  # the same as a set, for the repetition penalty
    stop_state: Int[Array, " B"] | None = None  # how much of a stop string the text ends with

    def rows(self, indices: Int[Array, " N"]) -> History:
        """The history of a batch made of these rows."""
        return jax.tree.map(lambda leaf: leaf[indices], self)

    def append(
        self, ids: Int[Array, " B"], slot: Int[Array, ""], options: Options
    ) -> tuple[History, Bool[Array, " B"]]:
        """With one more token a row; and which rows it ends, by a stop id or a stop string."""
        rows = jnp.arange(ids.shape[0])
        stops = jnp.isin(ids, options.stop_ids)
        stop_state = self.stop_state
        if stop_state is not None:
            assert options.stop_table is not None
            known = jnp.minimum(ids, options.stop_table.shape[1] - 1)
            packed = options.stop_table[stop_state, known].astype(jnp.int32)
            stops, stop_state = stops | (packed & 1 == 1), packed >> 1
        return History(
            tokens=lax.dynamic_update_slice_in_dim(self.tokens, ids[:, None], slot, axis=1),
            seen=None if self.seen is None else self.seen.at[rows, ids].set(True, mode="drop"),
            stop_state=stop_state,
        ), stops


def process(
    scores: Float[Array, "B V"],
    history: History,
    options: Options,
    step: Int[Array, ""],
    slot: Int[Array, ""],
    no_repeat_ngram_size: int = 0,
) -> Float[Array, "B V"]:
    """Penalties and bans, before the token for `slot` is chosen, the `step`-th new one."""
    if options.repetition_penalty is not None:
        assert history.seen is not None
        penalty = options.repetition_penalty
        scores = jnp.where(history.seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if no_repeat_ngram_size:
        scores = _ban_repeated_ngrams(scores, history.tokens, slot, no_repeat_ngram_size)
    if options.bad_words is not None:
        scores = _ban_words(scores, history.tokens, slot, options.bad_words)
    too_early = step < options.least
    return scores.at[:, options.stop_ids].min(jnp.where(too_early, -jnp.inf, jnp.inf), mode="drop")


def warp(scores: Float[Array, "B V"], options: Sampling) -> Float[Array, "B V"]:
    """Temperature, top-k, top-p and min-p.

    Nothing is sorted: the lowest score that stays is found bit by bit, which on a CPU takes a twentieth of the time.
    """
    scores = scores / options.temperature
    keys = _ordered(scores)
    if (top_k := options.top_k) is not None:
        stays = keys >= _largest(lambda at: _total(keys >= at) >= top_k, keys)  # equal scores stay together
        scores = jnp.where(stays, scores, -jnp.inf)
    if options.top_p is not None:
        scores = _top_p(scores, keys, options.top_p)
    if options.min_p is not None:
        shares = jax.nn.softmax(scores)
        scores = jnp.where(shares < options.min_p * shares.max(-1, keepdims=True), -jnp.inf, scores)
    return scores


def choose(scores: Float[Array, "B V"], keys: PRNGKeyArray | None, step: Int[Array, ""]) -> Int[Array, " B"]:
    """One token a row: the best, or with `keys`, one a row, drawn by softmax(scores)."""
    if keys is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def draw(key: PRNGKeyArray, row: Float[Array, " V"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(draw)(keys, scores).astype(jnp.int32)


def bad_words(words: Sequence[Sequence[int]]) -> BadWords:
    """`words` side by side."""
    longest = max(len(word) for word in words)
    padded = jnp.asarray([[_ANY_TOKEN] * (longest - len(word)) + list(word) for word in words], jnp.int32)
    return BadWords(padded[:, :-1], padded[:, -1])


def _ban_words(scores: Array, tokens: Array, slot: Array, words: BadWords) -> Array:
    length = words.prefixes.shape[1]
    # The first slots of all hold no more than the prompt's padding: fewer tokens than the prefix match nothing.
    padded = jnp.pad(tokens, ((0, 0), (length, 0)), constant_values=NO_TOKEN)
    recent = lax.dynamic_slice_in_dim(padded, slot, length, axis=1)
    completes = ((recent[:, None] == words.prefixes) | (words.prefixes == _ANY_TOKEN)).all(-1)
    return scores.at[:, words.lasts].min(jnp.where(completes, -jnp.inf, jnp.inf))


def _ban_repeated_ngrams(scores: Array, tokens: Array, slot: Array, size: int) -> Array:
    """Bans what has followed the last `size` - 1 tokens before."""
    num_slots = tokens.shape[1]
    starts = num_slots - size + 1
    follows = jnp.arange(starts) + size - 1 < slot
    for offset in range(size - 1):
        last = lax.dynamic_slice_in_dim(tokens, slot - size + 1 + offset, 1, axis=1)
        follows = follows & (tokens[:, offset : starts + offset] == last)
    banned = jnp.where(follows, tokens[:, size - 1 :], NO_TOKEN)
    return scores.at[jnp.arange(len(scores))[:, None], banned].set(-jnp.inf, mode="drop")


def _top_p(scores: Array, keys: Array, top_p: Array) -> Array:
    """Keeps the likeliest tokens that together reach `top_p`, one at least.

    Of equal scores on the edge as many stay as it takes, the first ids; which of them, transformers leaves open.
    """
    top_p = jnp.maximum(top_p, jnp.finfo(scores.dtype).tiny)
    shares = jax.nn.softmax(scores)
    edge = _largest(lambda at: _total(jnp.where(keys >= at, shares, 0)) >= top_p, keys)
    on_edge = keys == edge
    above = _total(jnp.where(keys > edge, shares, 0))
    each = jnp.max(jnp.where(on_edge, shares, 0), axis=-1, keepdims=True)
    earlier = jnp.cumsum(on_edge, axis=-1) - 1
    return jnp.where((keys > edge) | (on_edge & (above + earlier * each < top_p)), scores, -jnp.inf)


def _total(values: Array) -> Array:
    return jnp.sum(values, axis=-1, keepdims=True)


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """The bits of float32 numbers, turned so that they compare as the numbers do."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 equals 0
    return lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)


def _largest(holds: Callable[[UInt32[Array, "B 1"]], Bool[Array, "B 1"]], keys: UInt32[Array, "B V"]) -> Array:
    """The largest number for which `holds`, which is true up to there; 0 where it never is. [B, 1]"""

    def set_bit(i: Array, found: Array) -> Array:
        higher = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(higher), higher, found)

    return lax.fori_loop(0, 32, set_bit, jnp.zeros((len(keys), 1), jnp.uint32))
