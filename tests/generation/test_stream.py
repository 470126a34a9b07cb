"""A stream says what generate says, piece by piece."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.generation import GenerationConfig, generate, stream
from flax_vlm.layers.kv_cache import KVCache
from flax_vlm.processing import TextStream, Tokenizer
from tests.generation.test_stop_strings import llama_tokenizer
from tests.generation.tiny import PAD, TinyDecoder, TinyOutput, prompts, random_params

MODEL = TinyDecoder()
PARAMS = random_params(MODEL)
PROMPTS = prompts(5, 9, 2)
WIDTH = 9


def config(**options: Any) -> GenerationConfig:
    return GenerationConfig(**({"pad_token_id": PAD, "max_new_tokens": 12} | options))


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "temperature": 3.0}], ids=str)
def test_pieces_make_up_the_whole(options: dict[str, Any], chunk: int) -> None:
    free = generate(MODEL, PARAMS, PROMPTS, config(**options))
    stops = [int(free.sequences[0, WIDTH + 4]), int(free.sequences[1, WIDTH + 7])]
    whole = generate(MODEL, PARAMS, PROMPTS, config(eos_token_id=stops, **options))
    streamed = stream(MODEL, PARAMS, PROMPTS, config(eos_token_id=stops, **options), chunk=chunk)
    pieces = list(streamed)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.sequences[:, WIDTH:])
    assert pieces[0].shape == (3, 1)  # the first word does not wait for others
    assert {piece.shape[1] for piece in pieces[1:-1]} <= {chunk}
    np.testing.assert_array_equal(streamed.output.sequences, whole.sequences)
    np.testing.assert_array_equal(streamed.output.lengths, whole.lengths)


def test_a_stream_that_is_left_can_be_gone_on_from() -> None:
    options = config(return_dict_in_generate=True)
    cache = MODEL.init_cache(3, 64, jnp.float32)
    streamed = stream(MODEL, PARAMS, PROMPTS, options, chunk=4, cache=cache)
    said = [next(streamed), next(streamed)]
    so_far = streamed.output
    np.testing.assert_array_equal(so_far.sequences[:, WIDTH:], np.concatenate(said, axis=1))
    new = prompts(2, 2, 2, seed=1)
    out = generate(MODEL, PARAMS, new, options, cache=so_far.cache)
    mask = np.concatenate([PROMPTS["attention_mask"], np.ones((3, 7), int)], axis=1)
    inputs = {"input_ids": np.concatenate([so_far.sequences, new["input_ids"]], axis=1), "attention_mask": mask}
    expected = generate(MODEL, PARAMS, inputs, options)
    np.testing.assert_array_equal(out.sequences[:, 2:], expected.sequences[:, WIDTH + 7 :])


class Parrot(nn.Module):
    """Says row by row what `script` has, to prompts of a bucket of 16."""

    script: tuple[tuple[int, ...], ...]
    vocab: int
    dtype = jnp.float32
    token_inputs = frozenset()

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: Any) -> KVCache:
        return KVCache.create(batch_size, length, [], 1, dtype)

    def __call__(self, input_ids: Any, attention_mask: Any, cache: KVCache, **flags: Any) -> TinyOutput:
        length = input_ids.shape[1]
        said = cache.index + length - 16
        words = jnp.take(jnp.asarray(self.script), said, axis=1, mode="clip")
        return TinyOutput(jax.nn.one_hot(words, self.vocab)[:, None], cache.admit(attention_mask).advance(length, []))


BACKEND = llama_tokenizer()
END = BACKEND.token_to_id("</s>")


def spoken(*answers: str, chunk: int = 3, streams: Any = None) -> tuple[list[Any], list[str]]:
    """The pieces of answers that a model makes letter by letter, most of them from bytes; and the whole answers."""
    ids = [[i for letter in answer for i in ids_of(letter)] for answer in answers]
    longest = max(map(len, ids)) + 1
    script = tuple((*row, END, *[5] * (longest - len(row) - 1)) for row in ids)
    options = GenerationConfig(max_new_tokens=longest, eos_token_id=END)
    model = Parrot(script, BACKEND.get_vocab_size())
    prompt = {"input_ids": np.full((len(answers), 2), 7)}
    tokenizer = Tokenizer(BACKEND, {})
    streamed = stream(model, {}, prompt, options, text_stream=streams or partial(TextStream, tokenizer), chunk=chunk)
    given = list(streamed)
    return given, [tokenizer.decode(row[2:], skip_special_tokens=True) for row in streamed.output.sequences]


def ids_of(letter: str) -> list[int]:
    known = BACKEND.token_to_id("▁" if letter == " " else letter)
    return [BACKEND.token_to_id(f"<0x{byte:02X}>") for byte in letter.encode()] if known is None else [known]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_text_in_pieces(chunk: int) -> None:
    answers = ("ab ☃a", "b 猫", "a  ", "")
    pieces, whole = spoken(*answers, chunk=chunk)
    assert ["".join(row) for row in zip(*pieces, strict=True)] == whole == list(answers)
    assert not any("\ufffd" in text for piece in pieces for text in piece)
    assert len(pieces) > 1 or chunk == 100


def test_text_of_one_answer_is_a_string() -> None:
    pieces, whole = spoken("ab猫", chunk=2)
    assert pieces == ["a", "b", "猫"] and whole == ["ab猫"]  # its three bytes wait for each other, and for the end
    assert spoken("", chunk=2) == ([], [""])


def test_every_id_is_turned_into_text_once() -> None:
    class Counting:
        def __init__(self) -> None:
            self.ids: list[int] = []
            seen.append(self.ids)

        def put(self, token_id: int) -> str:
            self.ids.append(token_id)
            return "x"

        def end(self) -> str:
            return "."

    seen: list[list[int]] = []
    pieces, _ = spoken("abab", "a", chunk=2, streams=Counting)
    assert [len(ids) for ids in seen] == [5, 2]  # the stop id is one of an answer's own
    assert ["".join(row) for row in zip(*pieces, strict=True)] == ["xxxxx.", "xx."]


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="num_beams=2: beams cannot be streamed"):
        stream(MODEL, PARAMS, PROMPTS, config(num_beams=2))
    with pytest.raises(ValueError, match="chunk: expected 1 token or more, got 0"):
        stream(MODEL, PARAMS, PROMPTS, config(), chunk=0)
