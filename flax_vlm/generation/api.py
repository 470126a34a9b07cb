"""`generate`, all at once, and `stream`, as it comes.

B prompts   R answers to each   T tokens   N new tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int32

from flax_vlm.generation.beams import Beams
from flax_vlm.generation.config import GenerationConfig
from flax_vlm.generation.loop import begin, conclude, decode, prefill, repeat
from flax_vlm.generation.request import Request, bucket_length, make_request
from flax_vlm.generation.state import Decoding, State
from flax_vlm.layers.few_rows import for_few_rows
from flax_vlm.layers.kv_cache import KVCache
from flax_vlm.processing import TextStream


class GenerateOutput(struct.PyTreeNode):
    """What was generated; the R answers to a prompt stand one below the other, those of beams best first.

    Attributes:
      sequences: prompt, as it was given, and answer; what follows its end is padding.
      lengths: how many of the new tokens are the answer's own, its stop id among them.
      sequences_scores: of beams: log probability / length ** length_penalty.
      scores, logits: what each step chose from, after and before processing; a row for each beam.
      cache: holds `sequences` and nothing more; a next call goes on from it with new tokens only. None unless
        `return_dict_in_generate` was set or a cache was given, and after beams.
    """

    sequences: Int32[np.ndarray, "B*R T"]
    lengths: Int32[np.ndarray, " B*R"]
    sequences_scores: Float32[np.ndarray, " B*R"] | None = None
    scores: Float[Array, "N _ V"] | None = None
    logits: Float[Array, "N _ V"] | None = None
    cache: KVCache | None = None


def generate(
    model: Any,
    params: Any,
    inputs: Mapping[str, Any],
    config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    cache: KVCache | None = None,
    bucket: Callable[[int], int] | None = bucket_length,
) -> GenerateOutput:
    """Answers to the prompts in `inputs`.

    Compiled once for each bucket of lengths, batch size and kind of generation; other temperatures, seeds, stop ids or
    numbers of new tokens run the same program. Line "compiling ..." in the log (logger "flax_vlm", level INFO) says
    when it happens.

    Args:
      model: see state.py for what is asked of it.
      inputs: `input_ids` and `attention_mask`, padded on the left, and what else the model takes with its prompt.
      tokenizer: for `stop_strings`.
      cache: go on from it; `inputs` are the new tokens. It is used up: the output has the one to go on from. A larger
        one than `generate` would make, for a longer conversation, comes from `model.init_cache`.
      bucket: rounds lengths up; None takes them as they are.

    Raises:
      ValueError: for options and inputs that cannot be served, before the loop starts.
    """
    request = make_request(model, inputs, config or GenerationConfig(), tokenizer, cache, bucket)
    state = begin_request(model, params, request)
    return _output(request, go_on(model, params, request, state, request.limit))


def stream(
    model: Any,
    params: Any,
    inputs: Mapping[str, Any],
    config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    cache: KVCache | None = None,
    bucket: Callable[[int], int] | None = bucket_length,
    text_stream: Callable[[], TextStream] | None = None,
    chunk: int = 8,
    piece: int | None = None,
    history: Int32[np.ndarray, "B H"] | None = None,
) -> Stream:
    """`generate` in pieces, from the same compiled program: an iterator over what is new, `chunk` tokens at a time.

    Args:
      text_stream: makes what turns the ids of one answer into text; the pieces are then what the text has grown by, a
        string, or of several answers a list of them. Without it they are ids [rows, new], filled as the sequences are.
      chunk: fewer tokens come sooner, more of them ask the device less often.
      piece: read the prompt so many tokens at a time, into a cache that has to be given: one program for prompts of
        every length, and what fills the last piece takes no slots.
      history: the tokens that the answer follows, those in the cache among them, for penalties and stop strings; by
        default those of `inputs`.

    Raises:
      ValueError: as `generate`, and for beams, of which nobody knows the first word before the last.
    """
    config = config or GenerationConfig()
    if config.num_beams > 1:
        raise ValueError(f"num_beams={config.num_beams}: beams cannot be streamed. Use generate, or num_beams=1")
    if chunk < 1:
        raise ValueError(f"chunk: expected 1 token or more, got {chunk}")
    request = make_request(model, inputs, config, tokenizer, cache, bucket, piece, history)
    return Stream(model, params, request, text_stream, chunk)


class Stream(Iterator[Any]):
    """The answers in pieces.

    `output` is all there is of them so far, with a cache to go on from; leave the stream before using that.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        request: Request,
        text_stream: Callable[[], TextStream] | None,
        chunk: int,
    ) -> None:
        self._request = request
        self._state: Any = begin_request(model, params, request)
        self._chunk = chunk
        self._go_on = partial(go_on, model, params, request)
        self._pieces = (ids for ids, _ in self._chunks()) if text_stream is None else self._texts(text_stream)

    def __next__(self) -> Any:
        return next(self._pieces)

    @property
    def output(self) -> GenerateOutput:
        """The answers so far."""
        return _output(self._request, self._state)

    @property
    def is_lost(self) -> bool:
        """Whether an exception came while the state was with the device: there is no output then."""
        return self._state.logits.is_deleted()

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """New ids [rows, new], and how many of them are the row's own."""
        wanted = 1  # the first token comes alone, so that nobody waits for a whole chunk
        while not self._is_over():
            before = int(self._state.step)
            until = min(before + wanted, self._request.limit)
            self._state, wanted = self._go_on(self._state, until), self._chunk
            new, lengths = _answers(self._state)
            yield new[:, before:], np.maximum(lengths - before, 0)

    def _texts(self, text_stream: Callable[[], TextStream]) -> Iterator[str | list[str]]:
        rows = [text_stream() for _ in self._state.logits]
        for ids, lengths in self._chunks():
            own = (row_ids[:length].tolist() for row_ids, length in zip(ids, lengths, strict=True))
            yield from _said(["".join(map(row.put, row_ids)) for row, row_ids in zip(rows, own, strict=True)])
        yield from _said([row.end() for row in rows])

    def _is_over(self) -> bool:
        return int(self._state.step) >= self._request.limit or bool(self._state.done.all())


def _said(texts: list[str]) -> Iterator[str | list[str]]:
    """The piece of a stream that these texts are; none where nothing is new."""
    if any(texts):
        yield texts[0] if len(texts) == 1 else texts


def compile_ahead(
    model: Any,
    params: Any,
    inputs: Mapping[str, Any],
    config: GenerationConfig,
    *,
    tokenizer: Any = None,
    cache: KVCache | None = None,
) -> None:
    """Compiles all that `generate` and `stream` will run for inputs of these shapes, by running it for one token."""
    request = make_request(model, inputs, config, tokenizer, cache)
    state = begin_request(model, params, request)
    state = _decode(model, params, request, state, min(1, request.limit))
    if isinstance(state, Decoding) and not request.gives_cache:
        state = conclude(request.plan, request.options, state)
    jax.block_until_ready(state.logits)


def begin_request(model: Any, params: Any, request: Request) -> State:
    """The state after the prompt."""
    logits, cache = None, request.cache
    for inputs, count in request.readings():
        logits, cache = prefill(model, request.slots, request.flags, params, inputs, cache, count)
    assert logits is not None and cache is not None, "a prompt has a token"
    vocabulary = logits.shape[-1]
    unknown = sorted({i for word in request.config.bad_words for i in word if i >= vocabulary})
    if unknown:
        raise ValueError(f"bad_words_ids name {unknown}: expected ids below {vocabulary}, the model's vocabulary")
    if request.plan.copies > 1:
        logits, cache = repeat(request.plan.copies, logits, cache)
    return begin(request.plan, request.prompt, request.options, logits, cache)


def go_on(model: Any, params: Any, request: Request, state: Any, until: int) -> Any:
    """The state when so many tokens are new; what nobody goes on from is not asked for behind the last of them."""
    asked = until if (request.gives_cache or request.config.num_beams > 1) else min(until, request.limit - 1)
    if int(state.step) < asked:
        state = _decode(model, params, request, state, asked)
    if asked < until and not state.done.all():
        state = conclude(request.plan, request.options, state)
    return state


def _decode(model: Any, params: Any, request: Request, state: Any, until: int) -> Any:
    params = for_few_rows(params, len(state.logits))
    return decode(model, request.plan, params, request.options, state, np.int32(until))


def _answers(state: State) -> tuple[np.ndarray, np.ndarray]:
    """The new tokens [rows, N], or of beams [B, K, N], and how many of them are the row's own."""
    if isinstance(state, Beams):
        tokens, lengths = state.finished.tokens, state.finished.lengths
    else:
        assert isinstance(state, Decoding)
        tokens, lengths = state.history.tokens, state.lengths
    tokens, lengths, end, steps = jax.device_get((tokens, lengths, state.cache.index, state.step))
    return tokens[..., end - steps : end], lengths


def _output(request: Request, state: State) -> GenerateOutput:
    config = request.config
    new, lengths = _answers(state)
    scores = None
    if isinstance(state, Beams):
        best = slice(config.num_return_sequences)
        scores = np.asarray(state.finished.scores)[:, best].reshape(-1)
        new, lengths = new[:, best].reshape(len(scores), -1), lengths[:, best].reshape(-1)
    new = new[:, : lengths.max(initial=0)]
    new = np.where(np.arange(new.shape[1]) < lengths[:, None], new, config.fill_id)
    prompts = np.repeat(request.input_ids, config.num_return_sequences, axis=0)
    kept = {name: buffer[: int(state.step)] for name, buffer in state.kept.items()}
    return GenerateOutput(
        sequences=np.concatenate([prompts, new], axis=1),
        lengths=lengths,
        sequences_scores=scores,
        scores=kept.get("scores"),
        logits=kept.get("logits"),
        cache=state.cache if request.gives_cache else None,
    )
