"""AltCLIP and its towers against transformers: outputs, gradients, every argument."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm import convert
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.altclip import AltCLIPModel, AltCLIPTextModel, AltCLIPVisionModel, AltRobertaModel
from tests.parity import altclip_cases as cases
from tests.tolerances import BFLOAT16_RATIO, FLOAT32, FLOAT64, assert_close, assert_gradients_close

pytestmark = pytest.mark.torch

MODELS = {
    "AltCLIPModel": (AltCLIPModel, cases.WHOLE),
    "AltCLIPTextModel": (AltCLIPTextModel, cases.TEXT),
    "AltCLIPVisionModel": (AltCLIPVisionModel, cases.VISION),
    "AltRobertaModel": (AltRobertaModel, cases.TEXT),
}


def inputs_for(name: str, **changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if name != "AltCLIPVisionModel":
        inputs |= cases.texts()
    if name in ("AltCLIPModel", "AltCLIPVisionModel"):
        inputs["pixel_values"] = cases.images()
    return {key: value for key, value in (inputs | changes).items() if value is not None}


def both(name: str, dtype: str, inputs: dict[str, Any], **flags: Any) -> tuple[Any, Any, Any, Any]:
    """(our output, torch's output, our parameters, torch's model) on the same inputs."""
    model_class, config = MODELS[name]
    theirs = cases.torch_model(config, name, dtype)
    params = cases.ported(config, theirs, model_class)
    model = model_class(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    ours = cases.forward(model, params, cases.to_jax(inputs, dtype) | flags)
    hidden = flags.get("output_hidden_states", False)
    extra = {key: value for key, value in flags.items() if key == "return_loss"}
    return ours, theirs(**cases.to_torch(inputs, dtype), output_hidden_states=hidden, **extra), params, theirs


def compare(ours: Any, theirs: Any, tolerance: float) -> None:
    """Every field that transformers fills."""
    compared = 0
    for name, expected in theirs.items():
        actual = getattr(ours, name)
        if name.endswith("model_output"):
            compare(actual, expected, tolerance)
        elif isinstance(expected, tuple):
            assert len(actual) == len(expected), name
            for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
                assert_close(one, other.detach(), tolerance, f"{name}[{i}]")
        elif expected is not None:
            assert_close(actual, expected.detach(), tolerance, name)
        compared += expected is not None
    assert compared


@pytest.mark.parametrize("dtype, tolerance", [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("name", MODELS)
def test_outputs(name: str, dtype: str, tolerance: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        flags = {"return_loss": True} if name == "AltCLIPModel" else {}
        ours, theirs, *_ = both(name, dtype, inputs_for(name), output_hidden_states=True, **flags)
        compare(ours, theirs, tolerance)


TEXT_VARIANTS = {
    "no mask": {"attention_mask": None, "token_type_ids": None},
    "left padding": cases.texts(padding_side="left"),
    "one row": cases.texts(rows=1, length=5),
    "explicit positions": {"position_ids": np.arange(9)[None].repeat(3, 0)[:, ::-1].copy() + 3},
    "embeddings": {
        "input_ids": None,
        "inputs_embeds": np.random.default_rng(7).standard_normal((3, 9, cases.TEXT.hidden_size)),
    },
    "one mask row per query": {
        "attention_mask": np.random.default_rng(8).integers(0, 2, (3, 9, 9)) | np.eye(9, dtype=int)
    },
    "the longest text": cases.texts(length=cases.TEXT.max_position_embeddings - 2),
}


@pytest.mark.parametrize("variant", TEXT_VARIANTS)
def test_text_arguments(variant: str, x64: None) -> None:
    inputs = inputs_for("AltCLIPTextModel", **TEXT_VARIANTS[variant])
    if inputs.get("attention_mask", np.zeros(0)).ndim == 3:  # torch takes a boolean mask of its own shape here
        inputs["attention_mask"] = inputs["attention_mask"].astype(bool)
        model_class, config = MODELS["AltCLIPTextModel"]
        theirs = cases.torch_model(config, "AltCLIPTextModel", "float64")
        params = cases.ported(config, theirs, model_class)
        model = model_class(config, dtype=jnp.float64, param_dtype=jnp.float64)
        ours = cases.forward(model, params, cases.to_jax(inputs, "float64"))
        tensors = cases.to_torch(inputs, "float64")
        tensors["attention_mask"] = tensors["attention_mask"][:, None]
        compare(ours, theirs(**tensors), FLOAT64)
        return
    ours, theirs, *_ = both("AltCLIPTextModel", "float64", inputs)
    compare(ours, theirs, FLOAT64)


@pytest.mark.parametrize("height, width", [(30, 30), (29, 29), (28, 28), (44, 37), (15, 60), (70, 7), (33, 28)])
def test_interpolated_positions(height: int, width: int, x64: None) -> None:
    inputs = {"pixel_values": cases.images(2, height, width), "interpolate_pos_encoding": True}
    ours, theirs, *_ = both("AltCLIPVisionModel", "float64", inputs)
    compare(ours, theirs, FLOAT64)


def test_attentions_are_those_of_the_eager_path(x64: None) -> None:
    inputs = inputs_for("AltCLIPModel")
    theirs = cases.torch_model(cases.WHOLE, "AltCLIPModel", "float64")
    theirs.set_attn_implementation("eager")
    params = cases.ported(cases.WHOLE, theirs, AltCLIPModel)
    model = AltCLIPModel(cases.WHOLE, dtype=jnp.float64, param_dtype=jnp.float64)
    ours = cases.forward(model, params, cases.to_jax(inputs, "float64") | {"output_attentions": True})
    expected = theirs(**cases.to_torch(inputs, "float64"), output_attentions=True)
    for tower in ("text_model_output", "vision_model_output"):
        for one, other in zip(getattr(ours, tower).attentions, getattr(expected, tower).attentions, strict=True):
            # The eager path takes its softmax in float32, whatever the dtype.
            assert_close(one, other.detach(), FLOAT32, tower)


def test_features(x64: None) -> None:
    theirs = cases.torch_model(cases.WHOLE, "AltCLIPModel", "float64")
    params = cases.ported(cases.WHOLE, theirs, AltCLIPModel)
    model = AltCLIPModel(cases.WHOLE, dtype=jnp.float64, param_dtype=jnp.float64)
    text, pictures = cases.texts(), {"pixel_values": cases.images()}
    for method, inputs in (("get_text_features", text), ("get_image_features", pictures)):
        ours = cases.forward(model, params, cases.to_jax(inputs, "float64"), method)
        expected = getattr(theirs, method)(**cases.to_torch(inputs, "float64")).pooler_output
        assert_close(ours, expected.detach(), FLOAT64, method)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_gradients_of_the_contrastive_loss(scan: bool, x64: None) -> None:
    inputs = inputs_for("AltCLIPModel")
    theirs = cases.torch_model(cases.WHOLE, "AltCLIPModel", "float64")
    params = cases.ported(cases.WHOLE, theirs, AltCLIPModel)
    model = AltCLIPModel(
        cases.WHOLE, dtype=jnp.float64, param_dtype=jnp.float64, scan_layers=scan, remat="full" if scan else "none"
    )
    params = stack_params(params) if scan else params
    arrays = cases.to_jax(inputs, "float64")
    gradients = jax.jit(jax.grad(lambda p: model.apply({"params": p}, **arrays, return_loss=True).loss))(params)
    theirs(**cases.to_torch(inputs, "float64"), return_loss=True).loss.backward()

    ours = convert.state_dict(cases.WHOLE, gradients, key_style="v5")
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_gradients_close(ours, expected)
    padding = ours["text_model.roberta.embeddings.word_embeddings.weight"][cases.TEXT.pad_token_id]
    assert not padding.any(), "the padding row must not learn"


@pytest.mark.parametrize("name", ["AltCLIPModel", "AltRobertaModel"])
def test_initial_weights_are_spread_as_in_the_reference(name: str) -> None:
    """Mean and standard deviation of every parameter; sizes are large enough to tell them."""
    text = replace(cases.TEXT, hidden_size=96, intermediate_size=120, vocab_size=500, project_dim=80)
    vision = replace(cases.VISION, hidden_size=100, intermediate_size=140)
    config = text if name == "AltRobertaModel" else replace(cases.WHOLE, text_config=text, vision_config=vision)
    model = MODELS[name][0](config)
    params = nn.meta.unbox(model.init(jax.random.key(0), **model.example_inputs()))["params"]
    ours = convert.state_dict(config, params, MODELS[name][0], key_style="v5")
    theirs = cases.untouched_torch_model(config, name).state_dict()
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        expected, actual = expected.numpy(), ours[key]
        rows = slice(2, None) if "embeddings.weight" in key else ...  # row 1 is padding, and zero
        if not expected[rows].std():  # norms, biases, the logit scale
            np.testing.assert_array_equal(actual, expected, err_msg=key)
        else:
            spread = 5 / np.sqrt(2 * expected.size)  # five standard errors of a standard deviation
            np.testing.assert_allclose(actual[rows].std(), expected[rows].std(), rtol=2 * spread, err_msg=key)
            np.testing.assert_allclose(actual.mean(), expected.mean(), atol=2 * spread * expected.std(), err_msg=key)
    words = next(value for key, value in ours.items() if key.endswith("word_embeddings.weight"))
    assert not words[text.pad_token_id].any()


def test_bfloat16_is_as_close_to_float64_as_torch_is() -> None:
    inputs = cases.texts(rows=8, length=20) | {"pixel_values": cases.images(8)}
    model = AltCLIPModel(cases.WHOLE, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    forward = jax.jit(lambda params, arrays: model.apply({"params": params}, **arrays))
    squares: dict[str, np.ndarray] = {}
    for seed in range(3):
        half = cases.torch_model(cases.WHOLE, "AltCLIPModel", "bfloat16", seed)
        state = {name: value.float().numpy() for name, value in half.state_dict().items()}
        params = convert.from_state_dict(cases.WHOLE, state)
        ours = forward(
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params), cases.to_jax(inputs, "bfloat16")
        )
        theirs = half(**cases.to_torch(inputs, "bfloat16"))
        truth = half.double()(**cases.to_torch(inputs, "float64"))
        for name in ("image_embeds", "text_embeds"):
            expected = getattr(truth, name).detach().numpy()
            outputs = (np.asarray(getattr(ours, name)), getattr(theirs, name).detach().double().numpy())
            errors = [np.mean(np.square(output - expected)) for output in outputs]
            squares[name] = squares.get(name, 0) + np.array(errors)
    for name, (own, other) in squares.items():
        assert np.sqrt(own / other) <= BFLOAT16_RATIO, name
