"""Prompts that are read in pieces of one width, behind what a cache holds."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.generation import GenerationConfig, generate, stream
from tests.generation.test_stop_strings import word_tokenizer
from tests.generation.tiny import PAD, VOCAB, TinyDecoder, prompts, random_params

MODEL = TinyDecoder()
PARAMS = random_params(MODEL)
PROMPTS = prompts(5, 9, 2)
WIDTH, NEW = 9, 12


def in_pieces(inputs: Any, piece: int, cache: Any = None, history: Any = None, **options: Any) -> Any:
    config = GenerationConfig(pad_token_id=PAD, max_new_tokens=NEW, **options)
    cache = MODEL.init_cache(len(inputs["input_ids"]), 64, jnp.float32) if cache is None else cache
    tokenizer = word_tokenizer(VOCAB)
    streamed = stream(MODEL, PARAMS, inputs, config, cache=cache, tokenizer=tokenizer, piece=piece, history=history)
    for _ in streamed:
        pass
    return streamed.output


def at_once(inputs: Any, **options: Any) -> np.ndarray:
    config = GenerationConfig(pad_token_id=PAD, max_new_tokens=NEW, **options)
    return generate(MODEL, PARAMS, inputs, config, tokenizer=word_tokenizer(VOCAB)).sequences


@pytest.mark.parametrize("piece", [1, 4, 9, 16])
def test_pieces_say_what_the_whole_says(piece: int) -> None:
    pictures = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    for inputs in (PROMPTS, PROMPTS | {"pictures": pictures}):
        out = in_pieces(inputs, piece)
        np.testing.assert_array_equal(out.sequences, at_once(inputs))
        assert int(out.cache.index) == WIDTH + NEW, "what fills a piece takes no slots"
        assert out.cache.may_attend.sum(1).tolist() == [5 + NEW, 9 + NEW, 2 + NEW]


def test_one_program_reads_prompts_of_every_length(compiled: Any) -> None:
    in_pieces(prompts(*[3] * 5), 6)
    assert compiled() == 2
    for length in (1, 5, 7, 30):
        in_pieces(prompts(*[length] * 5), 6)
    assert compiled() == 0


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 2}, {"stop_strings": "stop"}]
)
def test_history_is_what_an_answer_follows(options: dict[str, Any]) -> None:
    whole = prompts(30)
    if "stop_strings" in options:  # begun by the last word of the prompt, and ended by the first of the answer
        words = [word_tokenizer(VOCAB).id_to_token(int(at_once(whole)[0, place])) for place in (29, 30)]
        options = {"stop_strings": "".join(words)}
    first = in_pieces({name: array[:, :20] for name, array in whole.items()}, 8).cache.rewind(20)
    rest = {name: array[:, 20:] for name, array in whole.items()}
    out = in_pieces(rest, 8, cache=first, history=whole["input_ids"], **options)
    expected = at_once(whole, **options)
    np.testing.assert_array_equal(out.sequences[:, 10:], expected[:, 30:])
    if "stop_strings" not in options:
        assert (expected != at_once(whole)).any(), "the option does nothing here"


def test_a_cache_is_rewound() -> None:
    whole = prompts(14)
    held = in_pieces(whole, 4).cache
    rest = {name: array[:, 6:] for name, array in whole.items()}
    again = in_pieces(rest, 4, cache=held.rewind(6), history=whole["input_ids"])
    np.testing.assert_array_equal(again.sequences[:, 8:], at_once(whole)[:, 14:])


def test_what_cannot_be_is_said() -> None:
    config = GenerationConfig(pad_token_id=PAD, max_new_tokens=NEW)
    with pytest.raises(ValueError, match="piece=4: expected 1 token or more, and a cache"):
        stream(MODEL, PARAMS, PROMPTS, config, piece=4)
    with pytest.raises(ValueError, match="piece=0: expected 1 token or more"):
        in_pieces(PROMPTS, 0)
    cache = MODEL.init_cache(3, WIDTH + NEW, jnp.float32)
    with pytest.raises(ValueError, match="21 slots, 0 of them used: 9 tokens and 12 new ones do not fit"):
        in_pieces(PROMPTS, 32, cache=cache)
