"""IDEFICS' towers alone against transformers, and what a fresh model starts with."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm import convert
from flax_vlm.models.idefics import (
    IdeficsForVisionText2Text,
    IdeficsPerceiverResampler,
    IdeficsVisionModel,
)
from tests.parity import idefics_cases as cases
from tests.tolerances import FLOAT64, assert_close, assert_gradients_close

pytestmark = pytest.mark.torch


def vision(dtype: str) -> tuple[Any, Any, Any]:
    """(our tower, its parameters, transformers')."""
    theirs = cases.torch_model(cases.RESAMPLED, dtype).model.vision_model
    params = cases.ported(cases.RESAMPLED, theirs, IdeficsVisionModel)
    model = IdeficsVisionModel(cases.VISION, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    return model, params, theirs


def pictures(height: int = 30, width: int = 30) -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(0).standard_normal((3, height, width, 3))}


@pytest.mark.parametrize("height, width", [(30, 30), (44, 37)])
def test_vision_model(height: int, width: int, x64: None) -> None:
    model, params, theirs = vision("float64")
    inputs = pictures(height, width)

    def loss(params: Any, pixels: Any) -> Any:
        interpolate = (height, width) != (30, 30)
        output = model.apply({"params": params}, pixels, interpolate, output_hidden_states=True)
        return (output.last_hidden_state**3).sum() + (output.pooler_output**3).sum(), output

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params, jnp.asarray(inputs["pixel_values"]))
    tensors = cases.to_torch(inputs | {"interpolate_pos_encoding": True}, "float64")
    expected = theirs(**tensors, output_hidden_states=True)
    ((expected.last_hidden_state**3).sum() + (expected.pooler_output**3).sum()).backward()
    assert_close(ours.last_hidden_state, expected.last_hidden_state.detach(), FLOAT64, "last_hidden_state")
    assert_close(ours.pooler_output, expected.pooler_output.detach(), FLOAT64, "pooler_output")
    # The norm behind the tower acts on the pooled token only.
    np.testing.assert_array_equal(ours.hidden_states[-1], ours.last_hidden_state)
    assert len(ours.hidden_states) == cases.VISION.num_hidden_layers + 1
    assert_gradients_close(convert.state_dict(cases.VISION, gradients), gradients_of(theirs))


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    return {name: each.grad.numpy() for name, each in model.named_parameters()}


# 4 rows and 4 columns were trained: the same count in another shape, more, fewer, one alone, and sizes whose rest is
# dropped. 31 x 31 keeps the table as it is; 14 x 56, as many patches, does not.
SIZES = [(31, 31), (29, 28), (14, 56), (44, 37), (15, 60), (70, 7), (7, 7), (62, 62), (13, 14)]


@pytest.mark.parametrize("height, width", SIZES)
def test_positions_at_other_sizes(height: int, width: int, x64: None) -> None:
    model, params, theirs = vision("float64")
    inputs = pictures(height, width)
    ours = model.apply(
        {"params": params}, jnp.asarray(inputs["pixel_values"]), method=lambda tower, x: tower.embeddings(x, True)
    )
    expected = theirs.embeddings(**cases.to_torch(inputs, "float64"), interpolate_pos_encoding=True)
    assert_close(ours, expected.detach(), FLOAT64)


def test_positions_in_bfloat16_are_interpolated_in_float32() -> None:
    """Black pictures make no patches: what is left are positions, rounded once."""
    model, params, theirs = vision("float32")
    model, params = model.clone(dtype=jnp.bfloat16), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    black = jnp.zeros((1, 44, 37, 3), jnp.bfloat16)
    ours = model.apply({"params": params}, black, method=lambda tower, x: tower.embeddings(x, True))
    tensors = cases.to_torch({"pixel_values": np.zeros(black.shape)}, "bfloat16")
    expected = theirs.bfloat16().embeddings(**tensors, interpolate_pos_encoding=True).detach().float().numpy()
    assert ours.dtype == jnp.bfloat16 and np.mean(np.asarray(ours, np.float32) == expected) > 0.99
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=2**-7)


def test_another_size_is_refused_in_the_words_of_the_reference(unchecked_types: None) -> None:
    model, params, theirs = vision("float32")
    with pytest.raises(ValueError) as ours:
        model.apply({"params": params}, jnp.zeros((1, 44, 37, 3)))
    with pytest.raises(ValueError) as expected:
        theirs(**cases.to_torch({"pixel_values": np.zeros((1, 44, 37, 3))}, "float32"))
    assert str(ours.value) == str(expected.value)


@pytest.mark.parametrize("norms", [False, True])
def test_perceiver_resampler(norms: bool, x64: None) -> None:
    config = replace(cases.RESAMPLED, perceiver_config=replace(cases.PERCEIVER, qk_layer_norms_perceiver=norms))
    theirs = cases.torch_model(config, "float64").model.perceiver_resampler
    params = cases.ported(config, theirs, IdeficsPerceiverResampler)
    model = IdeficsPerceiverResampler(config, dtype=jnp.float64, param_dtype=jnp.float64)
    context = np.random.default_rng(0).standard_normal((3, 13, 20))

    def loss(params: Any, context: Any) -> Any:
        latents = model.apply({"params": params}, context)
        return (latents**3).sum(), latents

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params, jnp.asarray(context))
    expected = theirs(cases.to_torch({"context": context}, "float64")["context"])
    (expected**3).sum().backward()
    assert_close(ours, expected.detach(), FLOAT64)
    assert_gradients_close(convert.state_dict(config, gradients, IdeficsPerceiverResampler), gradients_of(theirs))


@pytest.mark.parametrize("name", ["resampled", "plain"])
def test_initial_weights_are_spread_as_in_the_reference(name: str) -> None:
    """Mean and standard deviation of every parameter; sizes are large enough to tell them."""
    vision = replace(cases.VISION, hidden_size=100, intermediate_size=140, initializer_range=0.05)
    sizes = {"hidden_size": 120, "vocab_size": 200, "initializer_range": 0.05}
    config = replace(cases.WHOLE[name], vision_config=vision, **sizes)
    model = IdeficsForVisionText2Text(config)
    params = jax.jit(lambda key: nn.meta.unbox(model.init(key, **model.example_inputs())))(jax.random.key(0))
    ours = convert.state_dict(config, params["params"])
    theirs = cases.untouched_torch_model(config).state_dict()
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        expected, actual = expected.numpy(), ours[key]
        if not expected.std():  # norms, biases, gates of one number
            np.testing.assert_array_equal(actual, expected, err_msg=key)
        else:
            spread = 5 / np.sqrt(2 * expected.size)  # five standard errors of a standard deviation
            np.testing.assert_allclose(actual.std(), expected.std(), rtol=2 * spread, err_msg=key)
            np.testing.assert_allclose(actual.mean(), expected.mean(), atol=2 * spread * expected.std(), err_msg=key)
    padding = config.pad_token_id
    for state in (ours, theirs):
        zero_rows = (np.asarray(state["model.embed_tokens.weight"]) == 0).all(1)
        assert np.flatnonzero(zero_rows).tolist() == [padding]
