"""The compiled functions of generation.

    prefill   reads the prompts
    repeat    makes one row for each answer or beam
    begin     sets up the state
    decode    choose, write, ask the model; and again, `until` so many tokens are new or nothing is left to do
    conclude  choose and write the last one

`generate` runs decode to the end, `stream` in pieces: the same program, since `until` is traced. The cache is donated
from each to the next (`repeat` has to make a new one), so it stays where it is.

B rows   T prompt tokens   S slots of the cache   V vocabulary
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flax_vlm.generation.beams import beam_step, begin_beams
from flax_vlm.generation.processors import NO_TOKEN, History, Options, choose, process, warp
from flax_vlm.generation.state import Decoding, Plan, Prompt, State, ask
from flax_vlm.layers.kv_cache import KVCache

logger = logging.getLogger("flax_vlm")

AnyState = TypeVar("AnyState", bound=State)


@partial(jax.jit, static_argnames=("model", "slots", "flags"), donate_argnames="cache")
def prefill(
    model: Any,
    slots: int,
    flags: tuple[tuple[str, Any], ...],
    params: Any,
    inputs: dict[str, Array],
    cache: Any,
    count: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads the prompt, into a new cache of `slots` slots (`cache` is None) or behind what the given one holds.

    Of a piece of a prompt the first `count` tokens are read; those behind them fill it, and the next piece takes their
    slots.
    """
    batch, length = inputs["input_ids"].shape
    logger.info("compiling the prefill of %s for %d x %d tokens", type(model).__name__, batch, length)
    if cache is None:
        cache = model.init_cache(batch, slots, model.dtype)
    if count is None:
        return ask(model, params, cache, **inputs, **dict(flags))
    logits, after = ask(model, params, cache, keep=count[None] - 1, **inputs, **dict(flags))
    return logits, after.replace(index=cache.index + count)


@partial(jax.jit, static_argnames="copies")
def repeat(copies: int, logits: Float[Array, "B V"], cache: KVCache) -> tuple[Float[Array, "R V"], KVCache]:
    """Each row so many times."""
    rows = jnp.repeat(jnp.arange(len(logits)), copies)
    return logits[rows], cache.rows(rows)


@partial(jax.jit, static_argnames="plan", donate_argnames="cache")
def begin(plan: Plan, prompt: Prompt, options: Options, logits: Float[Array, "R V"], cache: KVCache) -> State:
    """The state after the prompt; logits and cache have been repeated for `plan.copies` already."""
    rows = jnp.repeat(jnp.arange(len(prompt.input_ids)), plan.copies)
    prompt_ids, mask = prompt.input_ids[rows], prompt.attention_mask[rows]
    length = prompt_ids.shape[1]
    # The prompt's ids end where its slots do, also for a model that has put an image into more slots than ids.
    ids = jnp.where(mask, prompt_ids, NO_TOKEN)
    tokens = jnp.pad(ids, ((0, 0), (cache.length - length, 0)), constant_values=NO_TOKEN)
    tokens = jnp.roll(tokens, cache.index, axis=1)
    seen = None
    if options.repetition_penalty is not None:
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")
    history = History(tokens, seen, None if prompt.stop_state is None else prompt.stop_state[rows])
    kept = {name: jnp.zeros((plan.steps, *logits.shape), jnp.float32) for name in plan.keep}
    start = {"step": jnp.int32(0), "logits": logits, "cache": cache, "history": history, "kept": kept}
    if options.beams is not None:
        return begin_beams(plan.copies, start)
    keys = None
    if prompt.seeds is not None:
        keys = jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(*prompt.seeds)
    none = jnp.zeros(len(logits), jnp.int32)
    return Decoding(**start, keys=keys, done=none > 0, lengths=none)


@partial(jax.jit, static_argnames=("model", "plan"), donate_argnames="state")
def decode(model: Any, plan: Plan, params: Any, options: Options, state: AnyState, until: Int[Array, ""]) -> AnyState:
    """Goes on until `until` tokens are new in all, or there is nothing left to do."""
    rows, slots = len(state.logits), state.cache.length
    logger.info("compiling the decode loop of %s for %d rows, %d slots", type(model).__name__, rows, slots)
    step: Any = _step if options.beams is None else beam_step

    def body(state: AnyState) -> AnyState:
        # Tied to the state, weights are not converted to a wider type in front of the loop, into a second copy.
        weights, logits = lax.optimization_barrier((params, state.logits))
        return step(model, plan, weights, options, state.replace(logits=logits))

    return lax.while_loop(lambda state: (state.step < until) & state.goes_on(), body, state)


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def conclude(plan: Plan, options: Options, state: Decoding) -> Decoding:
    """The last token: nothing follows, so the model is not asked."""
    written, _ = _write(plan, options, state)
    return written.replace(cache=state.cache.replace(index=state.cache.index + 1))


def _step(model: Any, plan: Plan, params: Any, options: Options, state: Decoding) -> Decoding:
    """One token for every row that has not ended, and what the model makes of it."""
    written, ids = _write(plan, options, state)
    logits, cache = ask(model, params, state.cache, input_ids=ids[:, None], attention_mask=~state.done[:, None])
    return written.replace(logits=logits, cache=cache)


def _write(plan: Plan, options: Options, state: Decoding) -> tuple[Decoding, Int[Array, " B"]]:
    """The next token of every row, chosen and noted."""
    slot = state.cache.index
    scores = process(state.logits, state.history, options, state.step, slot, plan.no_repeat_ngram_size)
    if options.sampling is not None:
        scores = warp(scores, options.sampling)
    ids = jnp.where(state.done, options.fill_id, choose(scores, state.keys, state.step))
    history, ends = state.history.append(ids, slot, options)
    written = state.replace(
        step=state.step + 1,
        history=history,
        kept=state.keeping(scores=scores, logits=state.logits),
        done=state.done | ends,
        lengths=state.lengths + ~state.done,
    )
    return written, ids
