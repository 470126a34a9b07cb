"""The same ids as transformers' generate, in every mode that leaves nothing to chance."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from flax_vlm.generation import GenerateOutput, GenerationConfig, generate
from tests.generation.tiny import PAD, TinyDecoder, params_of, prompts, torch_model
from tests.tolerances import FLOAT32, assert_close

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:Using the model-agnostic default")]

PROMPTS = prompts(5, 9, 2)
WIDTH = PROMPTS["input_ids"].shape[1]
# What this model likes to say; as stop ids they end its rows at different steps.
LIKED = [15, 32, 20, 34]


@cache
def params() -> Any:
    return params_of(torch_model())


def ours(tokenizer: Any = None, **options: Any) -> GenerateOutput:
    config = GenerationConfig(**({"pad_token_id": PAD} | options))
    return generate(TinyDecoder(), params(), PROMPTS, config, tokenizer=tokenizer)


def theirs(inputs: dict[str, np.ndarray] = PROMPTS, **options: Any) -> Any:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    options = {"pad_token_id": PAD, "return_dict_in_generate": True, "output_scores": True} | options
    return torch_model().generate(**tensors, **options)


def assert_same(out: GenerateOutput, expected: Any) -> None:
    np.testing.assert_array_equal(out.sequences, expected.sequences.numpy())


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 20},
        {},  # 20 as well
        {"max_length": WIDTH + 7},
        {"max_length": WIDTH + 1},
        {"max_new_tokens": 3, "max_length": 100},
        {"max_new_tokens": 20, "eos_token_id": 15},
        {"max_new_tokens": 20, "eos_token_id": LIKED},
        {"max_new_tokens": 1, "eos_token_id": LIKED},
        {"max_new_tokens": 20, "eos_token_id": 15, "pad_token_id": None},
        {"max_new_tokens": 20, "eos_token_id": LIKED, "min_new_tokens": 6},
        {"max_new_tokens": 20, "eos_token_id": LIKED, "min_length": WIDTH + 4},
        {"max_new_tokens": 20, "eos_token_id": LIKED, "min_length": WIDTH},
        {"max_new_tokens": 20, "eos_token_id": LIKED, "min_length": WIDTH + 9, "min_new_tokens": 2},
        {"max_new_tokens": 20, "repetition_penalty": 1.3},
        {"max_new_tokens": 20, "repetition_penalty": 0.7},
        {"max_new_tokens": 20, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 20, "no_repeat_ngram_size": 3},
        {"max_new_tokens": 20, "bad_words_ids": [[15], [32]]},
        {"max_new_tokens": 20, "bad_words_ids": [[32, 32], [15], [2, 2, 2], [15, 20, 32, 32]]},
        {"max_new_tokens": 20, "bad_words_ids": [[15], [32, 20]], "eos_token_id": [15, 7]},
        {
            "max_new_tokens": 20,
            "eos_token_id": LIKED,
            "min_new_tokens": 3,
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[34], [2, 2]],
        },
    ],
    ids=str,
)
def test_greedy(options: dict[str, Any]) -> None:
    expected = theirs(**options)
    out = ours(**options)
    assert_same(out, expected)
    stops = np.atleast_1d(options.get("eos_token_id", []))
    for row, length in zip(out.sequences[:, WIDTH:], out.lengths, strict=True):
        assert np.isin(row, stops).argmax() + 1 == length if np.isin(row, stops).any() else length == len(row)


def test_padding_is_nothing_that_could_be_repeated() -> None:
    options = {"max_new_tokens": 20, "no_repeat_ngram_size": 1}
    out = ours(**options)
    for row, length in enumerate((5, 9, 2)):  # one by one, since transformers takes padding for a word of the prompt
        alone = {name: array[row : row + 1, WIDTH - length :] for name, array in PROMPTS.items()}
        expected = theirs(alone, **options).sequences.numpy()
        np.testing.assert_array_equal(out.sequences[row : row + 1, WIDTH - length :], expected)


def test_what_each_step_chose_from() -> None:
    options = {"max_new_tokens": 6, "repetition_penalty": 1.5, "bad_words_ids": [[15]], "output_logits": True}
    expected, out = theirs(**options), ours(**options, output_scores=True)
    assert out.scores is not None and out.logits is not None
    assert len(out.scores) == len(out.logits) == 6
    for i in range(6):
        scores, reference = np.asarray(out.scores[i]), expected.scores[i].numpy()
        finite = np.isfinite(reference)
        np.testing.assert_array_equal(np.isfinite(scores), finite)
        assert_close(scores[finite], reference[finite], FLOAT32)
        assert_close(out.logits[i], expected.logits[i].numpy(), FLOAT32)


def assert_beams(options: dict[str, Any]) -> None:
    expected, out = theirs(**options), ours(**options, output_scores=True)
    assert_same(out, expected)
    assert out.scores is not None and len(out.scores) == len(expected.scores)  # the search ends as early
    assert_close(out.sequences_scores, expected.sequences_scores.numpy(), FLOAT32)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("num_beams", "num_return_sequences", "stops"), [(2, 1, 15), (3, 3, [15, 32]), (5, 2, 15)])
def test_beams(num_beams: int, num_return_sequences: int, stops: Any, early_stopping: Any) -> None:
    for length_penalty in (1.0, 0.0, -1.0, 2.5):
        assert_beams(
            {
                "max_new_tokens": 10,
                "num_beams": num_beams,
                "num_return_sequences": num_return_sequences,
                "early_stopping": early_stopping,
                "length_penalty": length_penalty,
                "eos_token_id": stops,
            }
        )


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 3},
        {"max_new_tokens": 1},
        {"max_length": WIDTH + 4, "eos_token_id": 32},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[32, 32], [15], [2, 2]]},
        {"eos_token_id": LIKED, "min_new_tokens": 5},
        {"eos_token_id": LIKED, "early_stopping": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_beams_with(options: dict[str, Any]) -> None:
    assert_beams({"num_beams": 3} | ({} if "max_length" in options else {"max_new_tokens": 10}) | options)


def test_finished_beams_are_filled_with_padding_even_if_it_is_0() -> None:
    options = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": 15, "pad_token_id": 0}
    out, expected = ours(**options), theirs(**options).sequences.numpy()
    own = np.arange(out.sequences.shape[1]) < WIDTH + out.lengths[:, None]
    np.testing.assert_array_equal(out.sequences[own], expected[own])
    assert (out.sequences[~own] == 0).all()
    assert (expected[~own] == 15).all()  # transformers takes an id of 0 for none


def test_scores_of_each_step_of_beams() -> None:
    options = {"max_new_tokens": 5, "num_beams": 3, "output_logits": True, "repetition_penalty": 1.4}
    expected, out = theirs(**options), ours(**options, output_scores=True)
    assert out.scores is not None and out.logits is not None
    assert out.scores.shape == (5, 3 * 3, 40)
    for i in range(5):
        assert_close(out.scores[i], expected.scores[i].numpy(), FLOAT32)
        assert_close(out.logits[i], expected.logits[i].numpy(), FLOAT32)


def test_stop_strings() -> None:
    import transformers

    from tests.generation.test_stop_strings import word_tokenizer

    backend = word_tokenizer(40)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    greedy = ours(max_new_tokens=20)
    words = [backend.id_to_token(int(i)) for i in greedy.sequences[0, WIDTH : WIDTH + 5]]
    across = words[2][-1] + words[3][:1]  # from the end of a word into the middle of the next
    without = ours(max_new_tokens=20, eos_token_id=20).lengths
    for stop in (words[1], across, [across, words[4]], "never said"):
        options = {"max_new_tokens": 20, "stop_strings": stop, "eos_token_id": 20}
        expected = theirs(**options, tokenizer=tokenizer)
        out = ours(**options, tokenizer=backend)
        assert_same(out, expected)
        assert (out.lengths[0] < without[0]) == (stop != "never said")
        beams = options | {"num_beams": 3, "max_new_tokens": 10}
        assert_same(ours(**beams, tokenizer=backend), theirs(**beams, tokenizer=tokenizer))
