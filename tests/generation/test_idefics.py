"""IDEFICS generates the ids that transformers' generate does: ragged prompts, each with pictures of its own or none.

All calls share the number of rows, slots and pictures, so that little is compiled.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.generation import GenerateOutput, GenerationConfig, generate, stream
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from tests.generation.test_stop_strings import word_tokenizer
from tests.parity import idefics_cases as cases
from tests.tolerances import FLOAT32, assert_close

pytestmark = pytest.mark.torch

CONFIG = cases.RESAMPLED
MODEL = IdeficsForVisionText2Text(CONFIG)
PAD = CONFIG.pad_token_id
VOCABULARY = CONFIG.vocab_size + CONFIG.additional_vocab_size
WIDTH, NEW = 11, 20
TEXTS = cases.texts(WIDTH, padding_side="left")
PICTURES = cases.images(WIDTH)  # 3, 1, 0 and 2 in a row
INPUTS = TEXTS | PICTURES


@cache
def torch_model(dtype: str = "float32") -> Any:
    """Weights large enough that the next ids differ clearly, by what stands before them and by the pictures."""
    import torch
    import transformers

    model = cases.torch_model(CONFIG, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3 if "embed_tokens" in name else 2 if parameter.ndim == 2 and "layers" in name else 1)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    return model


@cache
def params(dtype: str = "float32") -> Any:
    return cases.ported(CONFIG, torch_model(dtype))


def theirs(inputs: Mapping[str, Any] = INPUTS, tokenizer: Any = None, dtype: str = "float32", **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True} | options
    return torch_model(dtype).generate(**cases.to_torch(inputs, dtype), tokenizer=tokenizer, **options)


@cache
def stops() -> list[int]:
    """Three stop ids, which end the rows at different steps or not at all."""
    free = theirs().sequences[:, WIDTH:].numpy()
    return [int(free[0, 7]), int(free[1, 4]), int(free[2, 11])]


def config(**options: Any) -> GenerationConfig:
    return GenerationConfig(**({"pad_token_id": PAD, "max_new_tokens": NEW, "eos_token_id": stops()} | options))


def ours(
    inputs: Mapping[str, Any] = INPUTS,
    cache: Any = None,
    tokenizer: Any = None,
    dtype: str = "float32",
    **options: Any,
) -> Any:
    arrays, model = cases.to_jax(inputs, dtype), MODEL.clone(dtype=jnp.dtype(dtype))
    return generate(model, params(dtype), arrays, config(**options), cache=cache, tokenizer=tokenizer)


def assert_same(inputs: Mapping[str, Any] = INPUTS, **options: Any) -> tuple[GenerateOutput, Any]:
    expected, out = theirs(inputs, **({"eos_token_id": stops()} | options)), ours(inputs, **options)
    np.testing.assert_array_equal(out.sequences, expected.sequences.numpy())
    return out, expected


def test_greedy() -> None:
    out, _ = assert_same()
    assert len(set(out.lengths.tolist())) > 2
    # The 19th id of row 1 is a tie: its score is 2e-7 of their RMS above the next, and rounding decides.
    out, _ = assert_same(eos_token_id=[VOCABULARY - 1] * 3, min_new_tokens=NEW - 2, max_new_tokens=NEW - 2)
    assert (out.lengths == NEW - 2).all()
    assert (out.sequences[:, WIDTH:] >= CONFIG.vocab_size).any(), "none of the additional vocabulary"
    assert len(np.unique(out.sequences[:, WIDTH:])) > 20
    out, _ = assert_same(min_new_tokens=9)
    assert out.lengths.min() >= 9


def test_the_answer_depends_on_the_pictures_of_its_row_alone() -> None:
    free: dict[str, Any] = {"eos_token_id": [VOCABULARY - 1] * 3, "min_new_tokens": NEW}
    before = ours(**free).sequences
    others = ours(INPUTS | {"pixel_values": -PICTURES["pixel_values"]}, **free).sequences
    assert (before != others).any(axis=1).tolist() == [True, True, False, True]  # row 2 has none
    unseen = PICTURES["pixel_values"].copy()
    for row, count in enumerate(cases.IMAGES):
        unseen[row, count:] = 7  # where others have more pictures, nothing is looked at
    np.testing.assert_array_equal(ours(INPUTS | {"pixel_values": unseen}, **free).sequences, before)


def test_text_alone() -> None:
    dummy = {
        "pixel_values": np.zeros((4, 1, 30, 30, 3)),
        "image_attention_mask": np.zeros((4, WIDTH, 1), int),
    }
    expected = theirs(TEXTS | dummy, eos_token_id=stops()).sequences.numpy()
    np.testing.assert_array_equal(ours(TEXTS).sequences, expected)


def test_one_prompt_and_stop_strings() -> None:
    import transformers

    backend = word_tokenizer(VOCABULARY)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    one = {name: array[:1] for name, array in INPUTS.items()}
    free = theirs(one).sequences[0, WIDTH:].tolist()
    words = [backend.id_to_token(index) for index in free]
    place = next(i for i in range(2, NEW) if words[i] and words[i - 1])
    options = {"stop_strings": words[place - 1][-1] + words[place][0], "eos_token_id": [VOCABULARY - 1] * 3}
    expected = theirs(one, **options, tokenizer=tokenizer).sequences.numpy()
    out = ours(one, **options, tokenizer=backend)
    np.testing.assert_array_equal(out.sequences, expected)
    assert 0 < out.lengths[0] <= place + 1


@pytest.mark.parametrize("form", ["image_encoder_embeddings", "perceiver_embeddings"])
def test_pictures_that_are_embedded_already(form: str) -> None:
    tokens = 17 if form == "image_encoder_embeddings" else 6
    shape = (4, max(cases.IMAGES), tokens, CONFIG.vision_config.embed_dim)
    embedded = np.random.default_rng(3).standard_normal(shape)
    mask = {"image_attention_mask": PICTURES["image_attention_mask"]}
    given = TEXTS | mask | {form: embedded}
    if form == "image_encoder_embeddings":  # transformers' generate passes on the resampler's only
        import torch

        with torch.no_grad():
            states = torch_model().model.perceiver_resampler(torch.tensor(embedded.reshape(-1, *shape[2:])).float())
        embedded = states.numpy().reshape(4, shape[1], 6, -1)
    expected = theirs(TEXTS | mask | {"perceiver_embeddings": embedded}, eos_token_id=stops())
    np.testing.assert_array_equal(ours(given).sequences, expected.sequences.numpy())


def test_beams() -> None:
    # transformers takes a padding id of 0 for none where it fills beams.
    options = {"num_beams": 3, "num_return_sequences": 2, "pad_token_id": 1}
    for more in ({}, {"length_penalty": -1.0, "early_stopping": True}):
        out, expected = assert_same(**options, **more, output_scores=True)
        assert out.sequences.shape[0] == 8
        assert_close(out.sequences_scores, expected.sequences_scores.numpy(), FLOAT32)


def test_what_each_step_chose_from(x64: None) -> None:
    """The models in float64, what is chosen from in float32."""
    free = theirs().sequences[:, WIDTH:].numpy()
    options = {
        "repetition_penalty": 1.3,
        "bad_words_ids": [[int(free[0, 0])], [int(free[1, 1]), int(free[1, 2])]],
        "min_new_tokens": 4,
        "output_logits": True,
        "output_scores": True,
        "dtype": "float64",
    }
    out, expected = assert_same(**options)
    assert out.scores is not None and out.logits is not None
    assert len(out.scores) == len(expected.scores)
    for ours_kept, kept in ((out.scores, expected.scores), (out.logits, expected.logits)):
        for step, reference in enumerate(np.stack([each.numpy() for each in kept])):
            going = step < out.lengths  # what fills a row that has ended is not the model's
            found, reference = np.asarray(ours_kept[step])[going], reference[going]
            finite = np.isfinite(reference)
            np.testing.assert_array_equal(np.isfinite(found), finite)
            assert_close(found[finite], reference[finite], 1e-6)


def test_a_stream_says_the_same() -> None:
    whole = ours()
    pieces = list(stream(MODEL, params(), cases.to_jax(INPUTS, "float32"), config(), chunk=6))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.sequences[:, WIDTH:])


def test_a_prompt_of_similar_length_does_not_compile(compiled: Callable[[], int]) -> None:
    ours()
    compiled()
    ours(cases.inputs(14, padding_side="left"), eos_token_id=[5, 6, 7], max_new_tokens=NEW + 1)
    assert compiled() == 0


@pytest.mark.parametrize("with_pictures", [False, True], ids=["words", "pictures"])
def test_going_on_from_a_cache(with_pictures: bool) -> None:
    """A second turn says what one long prompt would; new pictures come with all that its tokens look at."""
    first = ours(return_dict_in_generate=True)
    ids = np.random.default_rng(5).integers(3, CONFIG.vocab_size, (4, 6))
    pixels = PICTURES["pixel_values"].copy()
    seen = np.repeat(PICTURES["image_attention_mask"][:, -1:], NEW + 6, axis=1)  # by the answer, and by the new words
    turn: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if with_pictures:
        for row, count in enumerate(cases.IMAGES):
            if count < 3:
                pixels[row, count] = np.random.default_rng(row).standard_normal((30, 30, 3))
                seen[row, NEW + 2 :] = np.eye(3, dtype=int)[count]
        turn |= {"pixel_values": pixels, "image_attention_mask": seen[:, NEW:]}
    options = {"max_new_tokens": 10}
    out = ours(turn, cache=first.cache, **options)

    # The answers' fillings become padding in the middle, which transformers leaves out of attention and positions.
    width = first.sequences.shape[1] - WIDTH
    own = np.arange(width) < first.lengths[:, None]
    whole = {
        "input_ids": np.concatenate([first.sequences, ids], axis=1),
        "attention_mask": np.concatenate([TEXTS["attention_mask"], own, turn["attention_mask"]], axis=1),
        "pixel_values": pixels,
        "image_attention_mask": np.concatenate(
            [PICTURES["image_attention_mask"], seen[:, :width], seen[:, NEW:]], axis=1
        ),
    }
    expected = theirs(whole, eos_token_id=stops(), **options).sequences.numpy()
    np.testing.assert_array_equal(out.sequences[:, 6:], expected[:, WIDTH + width + 6 :])
    assert len(np.unique(out.sequences[:, 6:])) > 4


def test_sampling_with_a_seed_for_each_row() -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    out = ours(seed=[7, 8, 9, 10], **options).sequences
    np.testing.assert_array_equal(ours(seed=[7, 8, 9, 10], **options).sequences, out)
    other = ours(seed=[6, 8, 9, 10], **options).sequences
    width = min(out.shape[1], other.shape[1])
    assert (out[:, :width] != other[:, :width]).any(axis=1).tolist() == [True, False, False, False]


def test_bfloat16() -> None:
    model = MODEL.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    options = {"eos_token_id": None, "return_dict_in_generate": True}
    out = generate(model, narrow, cases.to_jax(INPUTS, "bfloat16"), config(**options))
    assert out.sequences.shape == (4, WIDTH + NEW)
    assert out.sequences.min() >= 0 and out.sequences.max() < VOCABULARY
    assert out.cache is not None and out.cache.cross is not None
    assert out.cache.layers[0].key.dtype == out.cache.cross[0].key.dtype == jnp.bfloat16
