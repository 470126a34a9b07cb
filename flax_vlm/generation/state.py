"""What the compiled functions of generation pass on, and the one way in which they ask a model.

A model is a linen module with
    init_cache(batch_size, length, dtype)   an empty KVCache
    __call__(input_ids, attention_mask, cache, logits_to_keep=1 or [index], deterministic=True, **images)
                                            the mask speaks of the new tokens; returns `logits` [B, 1, V] and `cache`
    token_inputs                            names of further inputs whose axis 1 runs along the prompt's tokens
    extra_slots(input_ids, attention_mask, inputs, positions)
                                            may be absent; how many slots the prompt takes besides those of its ids.
                                            `positions` is how many prompt and answer have; ValueError for too many,
                                            and for further inputs (on the host, not padded) that do not fit the ids
It counts positions by its cache, and needs images once, with the prompt. For chats it also has
    pixel_input             the name of the input that pictures come in; absent where it takes none
    encode_images(pixels)   what it makes of them, {name: [B, I, ...]}, which is taken in their place
    init_cache(..., num_images), empty_encodings(batch_size, num_images)
                            a cache with room for so many besides the tokens, and encodings of nothing
    lay_out(inputs, num_images)
                            on the host: the inputs of a prompt as arrays of one entry a slot, [1, S, ...], in which
                            pictures stand that come encoded, I = num_images: any stretch of them can be read by itself

B rows   T prompt tokens   S slots of the cache   V vocabulary   N steps kept
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flax_vlm.generation.processors import History
from flax_vlm.layers.kv_cache import KVCache


class Plan(NamedTuple):
    """What is compiled in, besides shapes and which of the `Options` are there."""

    copies: int = 1  # rows that go on from each prompt: answers, or beams
    no_repeat_ngram_size: int = 0
    steps: int = 0  # new tokens at most, rounded up, where something is as long
    keep: tuple[str, ...] = ()  # of "scores" and "logits"


class Prompt(struct.PyTreeNode):
    """What the loop has to know of the prompts."""

    input_ids: Int[Array, "B T"]  # padded on the left
    attention_mask: Bool[Array, "B T"]
    stop_state: Int[Array, " B"] | None = None  # of stop strings that the prompt may have begun
    seeds: tuple[Array, Array] | None = None  # a row's seed, and a number to tell rows of one seed apart


class State(struct.PyTreeNode):
    """Between two steps; the cache holds all that was written, so a state can stop anywhere and be gone on from."""

    step: Int[Array, ""]  # new tokens so far
    logits: Float[Array, "B V"]  # for the next one
    cache: KVCache
    history: History
    kept: dict[str, Float[Array, "N B V"]]

    def goes_on(self) -> Bool[Array, ""]:
        """Whether there is anything left to do."""
        raise NotImplementedError

    def keeping(self, **values: Float[Array, "B V"]) -> dict[str, Array]:
        """`kept` with the values of this step."""
        return {
            name: lax.dynamic_update_index_in_dim(buffer, values[name], self.step, 0)
            for name, buffer in self.kept.items()
        }


class Decoding(State):
    """Greedy search and sampling."""

    keys: PRNGKeyArray | None
    done: Bool[Array, " B"]
    lengths: Int[Array, " B"]  # new tokens that are the row's own; the rest fills

    def goes_on(self) -> Bool[Array, ""]:
        return ~self.done.all()


def ask(
    model: Any, params: Any, cache: KVCache, keep: int | Int[Array, " 1"] = 1, **inputs: Any
) -> tuple[Float[Array, "B V"], KVCache]:
    """The model's logits for what comes next, in the float32 that transformers decides in, and its cache.

    What comes next follows the last of the inputs, or the one at the index `keep`.
    """
    out = model.apply({"params": params}, cache=cache, logits_to_keep=keep, deterministic=True, **inputs)
    return out.logits[:, -1].astype(jnp.float32), out.cache
