"""A stream says what generate says, piece by piece."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.generation import GenerationConfig, generate, stream
from tests.generation.test_stop_strings import byte_level_tokenizer
from tests.generation.tiny import PAD, TinyDecoder, prompts, random_params

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


def test_text_in_pieces() -> None:
    tokenizer = byte_level_tokenizer()

    def text(ids: np.ndarray) -> str:
        # The ids of the bytes that make an "ä", so that pieces end inside of a letter.
        halves = [tokenizer.token_to_id("Ã"), tokenizer.token_to_id("¤")]
        return tokenizer.decode([halves[i % 2] for i in range(len(ids))])

    pieces = list(stream(MODEL, PARAMS, PROMPTS, config(), decode_text=text, chunk=4))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == ["ä" * 6] * 3
    assert len(pieces) == 3  # 1, 5, 9, 12 tokens: the first is half a letter and says nothing
    assert all("\ufffd" not in piece for row in pieces for piece in row)
    # What never becomes a letter is said in the end.
    pieces = list(stream(MODEL, PARAMS, PROMPTS, config(max_new_tokens=7), decode_text=text, chunk=4))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == ["äää\ufffd"] * 3


def test_text_of_rows_that_end() -> None:
    free = generate(MODEL, PARAMS, PROMPTS, config())
    stops = [int(free.sequences[0, WIDTH + 4])]
    whole = generate(MODEL, PARAMS, PROMPTS, config(eos_token_id=stops))
    pieces = list(
        stream(
            MODEL, PARAMS, PROMPTS, config(eos_token_id=stops), decode_text=lambda ids: "".join(f"{i}," for i in ids)
        )
    )
    for row, (answer, length) in enumerate(zip(whole.sequences[:, WIDTH:], whole.lengths, strict=True)):
        assert "".join(piece[row] for piece in pieces) == "".join(f"{i}," for i in answer[:length])


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="num_beams=2: beams cannot be streamed"):
        stream(MODEL, PARAMS, PROMPTS, config(num_beams=2))
    with pytest.raises(ValueError, match="chunk: expected 1 token or more, got 0"):
        stream(MODEL, PARAMS, PROMPTS, config(), chunk=0)
