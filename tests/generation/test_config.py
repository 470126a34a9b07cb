"""GenerationConfig: transformers' names and defaults, and clear errors for what means nothing."""

from typing import Any

import pytest

from flax_vlm.generation import GenerationConfig

# Of the released models; GLM-4V's asks for sampling.
IDEFICS = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GLM4V = {
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "do_sample": True,
    "temperature": 0.8,
    "max_length": 8192,
    "top_p": 0.8,
    "transformers_version": "4.44.0",
}


@pytest.mark.torch
def test_defaults_are_those_of_transformers() -> None:
    import transformers

    theirs = transformers.GenerationConfig._get_default_generation_params()
    ours = GenerationConfig()
    shared = {name: value for name, value in theirs.items() if hasattr(ours, name) and "length" not in name}
    assert {name: getattr(ours, name) for name in shared} == shared
    assert ours.length_penalty == theirs["length_penalty"]
    assert ours.new_tokens(prompt_length=7) == (theirs["max_length"], theirs["min_length"])


def test_of_a_checkpoint() -> None:
    config = GenerationConfig.from_hf(IDEFICS)
    assert (config.stop_ids, config.fill_id, config.do_sample) == ((2,), 0, False)
    config = GenerationConfig.from_hf(GLM4V)
    assert (config.stop_ids, config.temperature, config.top_p, config.top_k) == ((151329, 151336, 151338), 0.8, 0.8, 50)
    assert config.new_tokens(100) == (8092, 0)


def test_of_a_model_that_has_no_options_of_its_own() -> None:
    data = {"model_type": "idefics", "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 100, "hidden_size": 16}
    config = GenerationConfig.from_hf(data)
    assert (config.stop_ids, config.pad_token_id, config.max_new_tokens) == ((2,), 0, None)


def test_what_is_inherited_may_lie_idle_what_is_asked_for_may_not() -> None:
    config = GenerationConfig.from_hf(GLM4V).updated(do_sample=False)
    assert config.temperature == 0.8
    assert config.updated(do_sample=True, seed=1).seed == 1
    with pytest.raises(ValueError, match="temperature does nothing without do_sample=True"):
        config.updated(temperature=0.5)
    with pytest.raises(ValueError, match="top_p does nothing without do_sample=True"):
        GenerationConfig(top_p=0.5)
    with pytest.raises(ValueError, match="length_penalty does nothing without num_beams > 1"):
        config.updated(length_penalty=2.0)
    assert GenerationConfig.from_hf({"early_stopping": True}).updated(num_beams=2).early_stopping is True


def test_updated_lengths() -> None:
    config = GenerationConfig.from_hf({"max_new_tokens": 50, "min_new_tokens": 5})
    assert config.updated(max_length=30).new_tokens(10) == (20, 5)
    assert config.updated(max_length=30, max_new_tokens=40).new_tokens(10) == (40, 5)
    assert config.updated(min_length=12).new_tokens(10) == (50, 2)
    assert config.updated(max_new_tokens=None).new_tokens(10) == (20, 5)


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        (10, {"max_length": 11}, (1, 0)),
        (10, {"max_length": 15, "min_length": 15}, (5, 5)),
        (10, {"max_length": 15, "min_length": 4}, (5, 0)),
        (10, {"max_length": 15, "max_new_tokens": 30}, (30, 0)),
        (10, {"min_length": 30, "min_new_tokens": 3}, (20, 3)),
    ],
)
def test_lengths(prompt: int, options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert GenerationConfig(**options).new_tokens(prompt) == expected


def test_lengths_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"10 tokens and max_length is 10: nothing is left.*Pass max_new_tokens"):
        GenerationConfig(max_length=10).new_tokens(10)
    with pytest.raises(ValueError, match="at least 6 new tokens, but at most 5"):
        GenerationConfig(max_new_tokens=5, min_length=16).new_tokens(10)
    for option in ("max_length", "min_length"):
        with pytest.raises(ValueError, match="pass max_new_tokens and min_new_tokens"):
            GenerationConfig(**{option: 16}).new_tokens(10, continued=True)
    assert GenerationConfig(max_new_tokens=5, max_length=16).new_tokens(10, continued=True) == (5, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0.0, "do_sample": True},
            r"temperature: expected a number above 0 \(greedy is",
        ),
        ({"top_k": -1, "do_sample": True}, "top_k: expected a whole number from 0 on, got -1"),
        ({"top_p": 1.5, "do_sample": True}, "top_p: expected a number from 0 to 1, got 1.5"),
        ({"min_p": -0.1, "do_sample": True}, "min_p: expected a number from 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number from 1 on, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number"),
        ({"min_length": -1}, "min_length: expected a whole number from 0 on"),
        ({"num_beams": 0}, "num_beams: expected a whole number from 1 on"),
        ({"num_beams": None}, "num_beams: expected a whole number from 1 on, got None"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0"),
        ({"length_penalty": float("nan"), "num_beams": 2}, "length_penalty: expected a number, got nan"),
        ({"early_stopping": "always", "num_beams": 2}, 'early_stopping: expected True, False or "never"'),
        ({"eos_token_id": [2, -1]}, "eos_token_id: expected an id of the vocabulary, or several"),
        ({"pad_token_id": -1}, "pad_token_id: expected an id"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: expected sequences of one id or more"),
        ({"stop_strings": ["a", ""], "eos_token_id": 1}, "stop_strings: expected a text, or several, none empty"),
        ({"stop_strings": "a"}, "stop_strings need pad_token_id"),
        ({"seed": 2**32, "do_sample": True}, "seed: expected a whole number from 0 to"),
        ({"do_sample": 1}, "do_sample: expected True or False, got 1"),
        ({"do_sample": True, "num_beams": 2}, "sampling with beams does not exist here"),
        ({"num_return_sequences": 2}, "greedy has one answer"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 is more than num_beams=2"),
        ({"seed": 3}, "seed does nothing without do_sample=True"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**options)


def test_all_faults_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens.*\n.*num_beams.*\n.*top_p"):
        GenerationConfig(max_new_tokens=-1, top_p=2, num_beams=0)


def test_options_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"cannot generate with typical_p=0.5: not known here.*temperature"):
        GenerationConfig.from_hf({"typical_p": 0.5})
    with pytest.raises(ValueError, match=r"with temprature=0\.5"):
        GenerationConfig().updated(temprature=0.5)
    assert GenerationConfig.is_option("typical_p") and GenerationConfig.is_option("use_cache")
    assert not GenerationConfig.is_option("pixel_values") and not GenerationConfig.is_option("inherited")
    assert GenerationConfig().updated(use_cache=True, typical_p=None) == GenerationConfig()
    assert GenerationConfig.from_hf({"typical_p": 1.0, "num_beam_groups": 1, "force_words_ids": None}).num_beams == 1
