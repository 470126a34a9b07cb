"""From what a person passes to what the compiled functions take: checked, padded to a bucket, as arrays. On the host.

B prompts   T tokens as given   S slots of the cache
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from flax_vlm.generation.config import GenerationConfig
from flax_vlm.generation.processors import BeamRules, Options, Sampling, bad_words
from flax_vlm.generation.state import Plan, Prompt
from flax_vlm.generation.stop_strings import stop_states, stop_table
from flax_vlm.layers.kv_cache import KVCache


def bucket_length(length: int) -> int:
    """`length` rounded up: to 16, 32, 64, from there to multiples of 64, from 1024 to an eighth of a power of two.

    Each bucket is compiled once; at most an eighth of a long prompt is padding.
    """
    if length <= 64:
        return max(16, 1 << max(0, length - 1).bit_length())
    step = max(64, 1 << ((length - 1).bit_length() - 4))
    return -(-length // step) * step


@dataclasses.dataclass(frozen=True)
class Request:
    """One call, ready to run."""

    config: GenerationConfig
    plan: Plan
    slots: int  # of the cache
    flags: tuple[tuple[str, Any], ...]  # arguments of the model that are no arrays
    inputs: dict[str, Any]  # ... and those that are
    prompt: Prompt
    options: Options
    input_ids: Int32[np.ndarray, "B T"]  # as given
    limit: int  # new tokens
    cache: KVCache | None
    piece: int | None  # the prompt is read so many tokens at a time, and not all at once
    along_tokens: frozenset[str]  # names of the inputs whose axis 1 is that of the tokens

    def readings(self) -> Iterator[tuple[dict[str, Any], np.int32 | None]]:
        """The inputs of each call that reads the prompt, and how many of their tokens count; None for all."""
        if self.piece is None:
            yield self.inputs, None
            return
        length = self.input_ids.shape[1]
        for start in range(0, length, self.piece):
            part = slice(start, start + self.piece)
            cut = {name: self.inputs[name][:, part] for name in self.along_tokens & self.inputs.keys()}
            yield self.inputs | cut, np.int32(min(self.piece, length - start))

    @property
    def gives_cache(self) -> bool:
        """Whether a later call may go on from this one."""
        return self.config.num_beams == 1 and (self.config.return_dict_in_generate or self.cache is not None)


def make_request(
    model: Any,
    inputs: Mapping[str, Any],
    config: GenerationConfig,
    tokenizer: Any = None,
    cache: KVCache | None = None,
    bucket: Callable[[int], int] | None = bucket_length,
    piece: int | None = None,
    history: Int32[np.ndarray, "B H"] | None = None,
) -> Request:
    """Raises ValueError for inputs that do not belong together, or that the cache has no room for."""
    arrays = {name: value for name, value in inputs.items() if value is not None}
    input_ids, mask = _tokens(arrays, config)
    batch, length = input_ids.shape
    if cache is not None:
        if cache.index.is_deleted():
            raise ValueError("this cache was used up by the call it was given to: go on from that one's output.cache")
        if cache.may_attend.shape[0] != batch:
            raise ValueError(f"the cache has {cache.may_attend.shape[0]} rows, and there are {batch} prompts")
    limit, least = config.new_tokens(length, continued=cache is not None)
    if piece is not None and (piece < 1 or cache is None):
        raise ValueError(f"piece={piece}: expected 1 token or more, and a cache for them, as model.init_cache gives it")
    round_up = bucket or int
    extra = _extra_slots(model, arrays, input_ids, mask, limit, cache)
    if cache is None:
        padded = round_up(length)
        slots = round_up(padded + extra + limit)
    else:
        slots = cache.length
        used = int(cache.index)
        whole = length if piece is None else -(-length // piece) * piece
        room = min(slots - used - limit - extra, slots - used - whole + length)
        if length > room:
            raise ValueError(
                f"the cache has {slots} slots, {used} of them used: {length + extra} tokens and {limit} new ones "
                "do not fit. Create it with a larger length, or pass a smaller max_new_tokens"
            )
        padded = min(round_up(length), room) if piece is None else whole

    flags = {name: arrays.pop(name) for name, value in list(arrays.items()) if isinstance(value, bool | str)}
    along_tokens = frozenset(getattr(model, "token_inputs", ()))
    for name in along_tokens & arrays.keys():
        shape = np.shape(arrays[name])
        if shape[:2] != (batch, length):
            raise ValueError(f"{name} has shape {shape}: expected {(batch, length)} in front, as input_ids")
        arrays[name] = _filled(arrays[name], padded) if piece else _padded(arrays[name], padded, arrays[name])
    tokens: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
    for name, fill in {"input_ids": config.fill_id, "attention_mask": 0}.items():
        given = tokens[name]
        tokens[name] = _filled(given, padded, fill) if piece else _padded(given, padded, inputs.get(name), fill)

    table = None
    if config.stop_texts:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=")
        table = stop_table(tokenizer, config.stop_texts)
    said, is_said = (input_ids, mask) if history is None else (history, np.ones(history.shape, bool))
    prompt = Prompt(
        **{"input_ids": _padded(said, slots), "attention_mask": _padded(is_said, slots)} if piece else tokens,
        stop_state=None if table is None else jnp.asarray(stop_states(table, said, is_said)),
        seeds=_seeds(config, batch) if config.do_sample else None,
    )
    keep = tuple(name for name in ("scores", "logits") if getattr(config, f"output_{name}"))
    plan = Plan(
        copies=config.num_beams if config.num_beams > 1 else config.num_return_sequences,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        keep=keep,
        steps=min(round_up(limit), slots) if keep or config.num_beams > 1 else 0,
    )
    return Request(
        config=config,
        plan=plan,
        slots=slots,
        flags=tuple(sorted(flags.items())),
        inputs=tokens | arrays,
        prompt=prompt,
        options=make_options(config, limit, least, slots, table),
        input_ids=input_ids,
        limit=limit,
        cache=cache,
        piece=piece,
        along_tokens=along_tokens | tokens.keys(),
    )


def make_options(
    config: GenerationConfig, limit: int, least: int, slots: int, table: np.ndarray | None = None
) -> Options:
    """The numbers of `config` as arrays; what it does not ask for is None."""
    sampling = beams = None
    if config.do_sample:
        sampling = Sampling(
            temperature=jnp.float32(config.temperature),
            top_k=jnp.int32(config.top_k) if config.top_k else None,
            top_p=jnp.float32(config.top_p) if config.top_p < 1 else None,
            min_p=None if config.min_p is None else jnp.float32(config.min_p),
        )
    if config.num_beams > 1:
        with np.errstate(all="ignore"):  # 0 ** -1 is never looked up, and infinity is right for what overflows
            norms = (np.arange(slots + 1, dtype=np.float64) ** config.length_penalty).astype(np.float32)
        beams = BeamRules(
            length_norms=jnp.asarray(norms),
            stop_when_full=jnp.bool_(config.early_stopping is True),
            hope_for_longest=jnp.bool_(config.early_stopping == "never" and config.length_penalty > 0),
        )
    return Options(
        limit=jnp.int32(limit),
        least=jnp.int32(least),
        stop_ids=jnp.asarray(config.stop_ids, jnp.int32),
        fill_id=jnp.int32(config.fill_id),
        repetition_penalty=jnp.float32(config.repetition_penalty) if config.repetition_penalty != 1 else None,
        bad_words=bad_words(config.bad_words) if config.bad_words else None,
        stop_table=None if table is None else jnp.asarray(table),
        sampling=sampling,
        beams=beams,
    )


def _tokens(
    arrays: dict[str, Any], config: GenerationConfig
) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Takes `input_ids` and `attention_mask` out of `arrays`."""
    if "input_ids" not in arrays:
        raise ValueError(f"generation begins with input_ids, got {sorted(arrays)}")
    input_ids = np.asarray(arrays.pop("input_ids"))
    if input_ids.ndim != 2 or not input_ids.size or not np.issubdtype(input_ids.dtype, np.integer):
        raise ValueError(
            f"input_ids: expected whole numbers [prompts, tokens], got {input_ids.dtype} of shape {input_ids.shape}"
        )
    given = arrays.pop("attention_mask", None)
    if given is None:
        if config.pad_token_id is not None and (input_ids == config.pad_token_id).any():
            raise ValueError(
                f"input_ids hold the padding id {config.pad_token_id}: pass attention_mask, which says whether it is "
                "padding"
            )
        given = np.ones(input_ids.shape, bool)
    mask = np.asarray(given) != 0
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {mask.shape}, input_ids {input_ids.shape}: expected the same (with a cache it "
            "speaks of the new tokens only)"
        )
    if not mask[:, -1].all():
        raise ValueError(
            f"prompts {np.flatnonzero(~mask[:, -1]).tolist()} end in padding: expected it on the left, where the "
            "answer does not begin. Set the tokenizer's padding_side to 'left'"
        )
    return input_ids.astype(np.int32), mask


def _extra_slots(
    model: Any, arrays: Mapping[str, Any], input_ids: np.ndarray, mask: np.ndarray, limit: int, cache: KVCache | None
) -> int:
    """Slots that the prompt takes besides those of its ids."""
    if not hasattr(model, "extra_slots"):
        return 0
    past = 0 if cache is None else np.asarray(cache.next_position)
    ends = past + mask.sum(-1) if "position_ids" not in arrays else np.max(arrays["position_ids"]) + 1
    return model.extra_slots(input_ids, mask, arrays, int(np.max(ends)) + limit)


def _filled(array: Any, length: int, fill: int | None = None) -> np.ndarray:
    """`array` with more columns on the right, of `fill` or as the last one."""
    widths = [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, widths, "edge") if fill is None else np.pad(array, widths, constant_values=fill)


def _padded(array: Any, length: int, given: Any = None, fill: int = 0) -> Array:
    """`array` with more columns on the left, and where `given` is, which may be spread over a mesh."""
    array = np.asarray(array)
    widths = [(0, 0), (length - array.shape[1], 0)] + [(0, 0)] * (array.ndim - 2)
    array = np.pad(array, widths, constant_values=fill)
    return jax.device_put(array, given.sharding) if isinstance(given, jax.Array) else jnp.asarray(array)


def _seeds(config: GenerationConfig, batch: int) -> tuple[Array, Array]:
    """For each row: a seed, and a number that tells rows of the same seed apart."""
    answers, seed = config.num_return_sequences, config.seed
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(seed, int | np.integer):
        return jnp.full(batch * answers, seed, jnp.uint32), jnp.arange(batch * answers, dtype=jnp.uint32)
    if len(seed) != batch:
        raise ValueError(f"seed names {len(seed)} numbers, and there are {batch} prompts: expected one for each")
    return jnp.repeat(jnp.asarray(seed, jnp.uint32), answers), jnp.tile(jnp.arange(answers, dtype=jnp.uint32), batch)
