"""Weights in eight bits: what they stand for, and that every layer takes them as it takes floats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.layers import few_rows, quantized
from flax_vlm.layers.decoupled import DecoupledEmbed, DecoupledHead
from flax_vlm.layers.embed import Embed
from flax_vlm.layers.few_rows import UNROLLED
from flax_vlm.layers.linear import Dense, matmul
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.layers.quantized import BLOCK, Quantized, is_quantized, quantize, quantize_params
from flax_vlm.layers.stack import stack_params, unstack_params
from tests.tolerances import FLOAT32, FLOAT64, assert_close

RNG = np.random.default_rng(0)
FEATURES = 5


@pytest.fixture(autouse=True)
def few_rows_of_small_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "LARGE", 0)


def floats(kernel: Quantized) -> np.ndarray:
    """What a quantized array stands for."""
    return np.asarray(kernel.values, np.float64) * np.asarray(kernel.scale, np.float64)


def array(*shape: int, dtype: Any = jnp.float64) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_nearest_of_255_values(axis: int, x64: None) -> None:
    weights = array(7, FEATURES).at[:, 2].set(0).at[3].set(0)
    found = quantize(weights, axis)
    assert found.shape == weights.shape and found.values.dtype == jnp.int8
    assert found.scale.shape == ((1, FEATURES), (7, 1))[axis]
    off = np.abs(floats(found) - weights)
    assert (off <= np.asarray(found.scale) * 0.5001).all()
    assert np.abs(found.values).max(axis).max() == 127
    assert not floats(found)[3].any(), "zeros stay zeros"
    np.testing.assert_array_equal(floats(found.T), floats(found).T)


@pytest.mark.parametrize("width", [7, BLOCK, 2 * BLOCK + 13])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (2, 3)])
def test_a_product(rows: tuple[int, ...], width: int, x64: None) -> None:
    kernel, inputs, bias = quantize(array(width, FEATURES), 0), array(*rows, width), array(FEATURES)
    expected = np.asarray(inputs) @ floats(kernel) + bias
    assert_close(matmul(inputs, kernel, bias), expected, FLOAT64)
    assert_close(matmul(inputs.astype(jnp.float32), kernel, bias), expected, FLOAT32)
    narrow = inputs.astype(jnp.bfloat16)
    summed = matmul(narrow, kernel)
    assert summed.dtype == jnp.bfloat16
    # In bfloat16, which holds whole numbers up to 127, the result alone is rounded.
    exact = np.asarray(narrow, np.float64) @ floats(kernel)
    np.testing.assert_allclose(np.asarray(summed, np.float64), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("width", [3, UNROLLED + 3, BLOCK + 9])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("on_cpu", [quantized._of_few, quantized._in_blocks])
def test_on_all_devices_the_product_is_one(on_cpu: Callable[..., Any], rows: int, width: int, x64: None) -> None:
    values, inputs = quantize(array(width, FEATURES), 0).values, array(rows, width)
    assert_close(on_cpu(inputs, values), quantized._widened(inputs, values), FLOAT64)


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_go_through_to_the_inputs(rows: int, x64: None) -> None:
    kernel, inputs = quantize(array(BLOCK + 9, FEATURES), 0), array(rows, BLOCK + 9)
    found = jax.grad(lambda inputs: jnp.square(matmul(inputs, kernel)).sum())(inputs)
    assert_close(found, 2 * (np.asarray(inputs) @ floats(kernel)) @ floats(kernel).T, FLOAT64)


LAYERS = {
    "Dense": lambda **types: (Dense(FEATURES, **types), array(2, 7)),
    "Embed": lambda **types: (Embed(6, 7, padding_idx=1, **types), jnp.asarray([[0, 1], [5, 3]])),
    "DecoupledEmbed": lambda **types: (
        DecoupledEmbed(6, 7, num_additional_embeddings=2, **types),
        jnp.asarray([[0, 5], [6, 7]]),
    ),
    "DecoupledHead": lambda **types: (DecoupledHead(6, num_additional_features=3, **types), array(2, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_them_for_floats(name: str, x64: None) -> None:
    for types in ({"dtype": jnp.float64, "param_dtype": jnp.float64}, {"param_dtype": jnp.float64}):
        layer, inputs = LAYERS[name](**types)
        params = quantize_params(nn.meta.unbox(layer.init(jax.random.key(0), inputs))["params"])
        assert is_quantized(params)
        dense = jax.tree.map(
            lambda leaf: jnp.asarray(floats(leaf)) if isinstance(leaf, Quantized) else leaf,
            params,
            is_leaf=lambda leaf: isinstance(leaf, Quantized),
        )
        # A table alone has no other dtype to go by than the layer's: without one its rows are in float32.
        tolerance = FLOAT64 if "dtype" in types or name in ("Dense", "DecoupledHead") else FLOAT32
        assert_close(layer.apply({"params": params}, inputs), layer.apply({"params": dense}, inputs), tolerance)
        if isinstance(layer, Embed):
            states = array(3, 7)
            tied, expected = (layer.apply({"params": each}, states, method="attend") for each in (params, dense))
            assert_close(tied, expected, FLOAT64)


def test_ids_outside_the_table_give_nan() -> None:
    rows = quantize(array(6, 7, dtype=jnp.float32), 1).rows(jnp.asarray([5, 6]), jnp.float32)
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all()


def test_only_what_takes_the_memory() -> None:
    params = {
        "layers_0": {"q": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}},
        "words": {"embedding": jnp.ones((5, 3))},
        "patches": {"kernel": jnp.ones((2, 2, 3, 4))},
        "position_embedding": jnp.ones((5, 3)),
    }
    made = flatten_params(quantize_params(params))
    assert {path for path, leaf in made.items() if isinstance(leaf, Quantized)} == {
        "layers_0/q/kernel",
        "words/embedding",
    }
    assert made["words/embedding"].scale.shape == (5, 1)
    assert not is_quantized(params)


def test_layers_are_stacked_and_unstacked() -> None:
    layers = {f"layers_{i}": {"kernel": array(3, 4, dtype=jnp.float32)} for i in range(2)}
    params = quantize_params(layers)
    stacked = stack_params(params)
    assert stacked["layers"]["kernel"].shape == (2, 3, 4) and stacked["layers"]["kernel"].scale.shape == (2, 1, 4)
    jax.tree.map(np.testing.assert_array_equal, unstack_params(stacked), params)
