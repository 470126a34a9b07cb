"""Beam search, as transformers 5.23 does it (`_beam_search` and its helpers).

Each prompt has K running beams and its K best finished sequences. A step takes the C best continuations of the running
beams: those that end may enter the finished ones, the best of the others run on. C is large enough for K to run on
even where every beam goes on best by ending.

A finished sequence of n new tokens is worth (sum of log probabilities) / n ** length_penalty. What must not be taken is
pushed down by 1e9, as in the reference.

B prompts   K beams   C candidates   S slots of the cache   V vocabulary
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flax_vlm.generation.processors import Options, process
from flax_vlm.generation.state import Plan, State, ask

_FAR = -1.0e9


class Sequences(struct.PyTreeNode):
    """Some sequences of each prompt."""

    tokens: Int[Array, "B C S"]  # by slot
    scores: Float[Array, "B C"]
    lengths: Int[Array, "B C"]  # new tokens
    ended: Bool[Array, "B C"]  # else only a place is taken


class Beams(State):
    """A search; the rows of the state are the running beams, B * K."""

    running: Float[Array, "B K"]  # log probability so far, the best first
    finished: Sequences  # K of each prompt, the best first
    over: Bool[Array, " B"]  # the running beams of this prompt can no longer improve on the finished ones
    stopped: Bool[Array, ""]

    def goes_on(self) -> Bool[Array, ""]:
        return ~self.stopped


def begin_beams(num_beams: int, start: dict[str, Any]) -> Beams:
    """K beams that are alike; only the first may be continued, or they would stay so."""
    tokens = start["history"].tokens
    tokens = tokens.reshape(-1, num_beams, tokens.shape[-1])
    prompts = len(tokens)
    far = jnp.full((prompts, num_beams), _FAR, jnp.float32)
    return Beams(
        **start,
        running=far.at[:, 0].set(0),
        finished=Sequences(tokens, far, jnp.zeros(far.shape, jnp.int32), jnp.zeros(far.shape, bool)),
        over=jnp.zeros(prompts, bool),
        stopped=jnp.bool_(False),
    )


def beam_step(model: Any, plan: Plan, params: Any, options: Options, state: Beams) -> Beams:
    """One more token for every running beam."""
    rules = options.beams
    assert rules is not None
    prompts, beams = state.running.shape
    slot, new_length = state.cache.index, state.step + 1
    log_probs = jax.nn.log_softmax(state.logits)
    log_probs = process(log_probs, state.history, options, state.step, slot, plan.no_repeat_ngram_size)

    # The best continuations, with what their beams have written.
    vocabulary = log_probs.shape[-1]
    sums = log_probs.reshape(prompts, beams, vocabulary) + state.running[..., None]
    num_candidates = max(2, 1 + len(options.stop_ids)) * beams
    sums, picks = lax.top_k(sums.reshape(prompts, -1), num_candidates)
    parents = picks // vocabulary + beams * jnp.arange(prompts)[:, None]
    ids = picks % vocabulary
    history, ends = state.history.rows(parents.ravel()).append(ids.ravel(), slot, options)
    ends = ends.reshape(ids.shape) | (new_length >= options.limit)

    # Those that run on ...
    running, chosen = lax.top_k(sums + ends * _FAR, beams)
    rows = (chosen + num_candidates * jnp.arange(prompts)[:, None]).ravel()

    # ... and those that are finished: only the K best candidates may be, the others are there to run on.
    full = state.finished.ended.all(-1, keepdims=True) & rules.stop_when_full
    ended = ends & (jnp.arange(num_candidates) < beams)
    scores = sums / rules.length_norms[new_length]
    scores = scores + full * _FAR + state.over[:, None] * _FAR + ~ended * _FAR
    candidates = Sequences(
        history.tokens.reshape(*ids.shape, -1), scores, jnp.full(ids.shape, new_length, jnp.int32), ended
    )
    finished = _best(state.finished, candidates)

    # Can a running beam still become better than the worst finished sequence?
    best_length = jnp.where(rules.hope_for_longest, options.limit, new_length)
    hope = running[:, :1] / rules.length_norms[best_length]
    over = state.over | (hope <= finished.scores[:, -1:])[:, 0]
    stopped = over.all() | (finished.ended.all() & rules.stop_when_full) | ends.all()

    parents = parents.ravel()[rows]
    cache = state.cache.reorder(parents, slot - state.step, plan.steps)
    ids = ids.ravel()[rows][:, None]
    logits, cache = ask(model, params, cache, input_ids=ids, attention_mask=jnp.ones(ids.shape, bool))
    return state.replace(
        step=new_length,
        logits=logits,
        cache=cache,
        history=history.rows(rows),
        kept=state.keeping(scores=log_probs, logits=state.logits),
        running=running,
        finished=finished,
        over=over,
        stopped=stopped,
    )


def _best(finished: Sequences, candidates: Sequences) -> Sequences:
    """The best of both, as many as there are finished ones."""
    both: Sequences = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), finished, candidates)
    scores, chosen = lax.top_k(both.scores, finished.scores.shape[1])

    def take(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf, chosen[..., None] if leaf.ndim == 3 else chosen, axis=1)

    return Sequences(take(both.tokens), scores, take(both.lengths), take(both.ended))
