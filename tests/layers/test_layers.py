"""The small layers, each against its formula or torch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.layers.embed import Embed
from flax_vlm.layers.feed_forward import MLP, activation
from flax_vlm.layers.kv_cache import KVCache
from flax_vlm.layers.linear import Dense, matmul
from flax_vlm.layers.norms import LayerNorm, RMSNorm
from tests.tolerances import FLOAT32, FLOAT64, assert_close

RNG = np.random.default_rng(0)


def test_dense_is_the_formula(x64: None) -> None:
    layer = Dense(7, dtype=jnp.float64, param_dtype=jnp.float64, bias_init=nn.initializers.normal(1.0))
    x = jnp.asarray(RNG.standard_normal((2, 3, 5)))
    params = nn.meta.unbox(layer.init(jax.random.key(0), x))
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    assert_close(layer.apply(params, x), np.asarray(x) @ kernel + bias, FLOAT64)


def test_bfloat16_products_add_up_in_float32_and_round_once() -> None:
    x, kernel = (jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16) for shape in ((4, 4096), (4096, 8)))
    bias = jnp.asarray(RNG.standard_normal(8), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    out = matmul(x, kernel, bias)
    assert out.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    off_by_one_bit = np.abs(np.asarray(out, np.float64) - rounded) > 0
    assert off_by_one_bit.mean() < 0.1  # only where float32's own rounding falls next to a tie
    text = jax.jit(matmul).lower(x, kernel, bias).as_text()
    assert "(tensor<4x4096xbf16>, tensor<4096x8xbf16>) -> tensor<4x8xf32>" in text


@pytest.mark.parametrize(
    "layer",
    [LayerNorm(), RMSNorm(), activation("quick_gelu"), activation("gelu_new")],
    ids=["LayerNorm", "RMSNorm", "quick_gelu", "gelu_new"],
)
def test_the_backward_pass_keeps_what_goes_in_alone(layer: Any) -> None:
    x = jnp.asarray(RNG.standard_normal((3, 64)), jnp.bfloat16)

    def function(x: jax.Array) -> jax.Array:
        return layer.bind({"params": scales})(x) if isinstance(layer, nn.Module) else layer(x)

    scales = {name: jnp.ones(64, jnp.bfloat16) for name in ("scale", "bias")}
    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(function, x)[1]) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu")
OTHERS = ("relu", "relu2", "relu6", "leaky_relu", "silu", "swish", "mish", "tanh", "sigmoid", "linear")


def test_a_row_alone_is_the_row_among_others() -> None:
    rows, kernel = (jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16) for shape in ((3, 5), (5, 7)))
    product = jax.jit(jax.value_and_grad(lambda rows: matmul(rows, kernel).sum()))
    alone = [product(row) for row in (rows[0], rows[1:2], rows[2:, None])]
    _, gradient = product(rows)
    np.testing.assert_array_equal(np.concatenate([each.reshape(1, 5) for _, each in alone]), gradient)
    np.testing.assert_array_equal(matmul(rows[2:, None], kernel)[:, 0], matmul(rows, kernel)[2:])


@pytest.mark.torch
@pytest.mark.parametrize("name", GELUS + OTHERS)
def test_activations_are_those_of_transformers(name: str) -> None:
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-9, 9, 1001)
    with jax.enable_x64(True):
        expected = ACT2FN[name](torch.tensor(x))
        # gelu_fast writes its constants with ten digits.
        assert_close(activation(name)(jnp.asarray(x)), expected, 1e-8 if name == "gelu_fast" else FLOAT64)
    half = activation(name)(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'softsign': expected one of gelu, gelu_fast"):
        activation("softsign")


def test_mlp(x64: None) -> None:
    mlp = MLP(9, "relu", dtype=jnp.float64, param_dtype=jnp.float64)
    x = jnp.asarray(RNG.standard_normal((2, 5)))
    params = nn.meta.unbox(mlp.init(jax.random.key(0), x))
    kernels = [np.asarray(params["params"][name]["kernel"]) for name in ("fc1", "fc2")]
    assert_close(mlp.apply(params, x), np.maximum(np.asarray(x) @ kernels[0], 0) @ kernels[1], FLOAT64)


@pytest.mark.parametrize("dtype, tolerance", [("float64", FLOAT64), ("float32", FLOAT32)])
def test_norms_are_their_formulas(dtype: str, tolerance: float) -> None:
    x = RNG.standard_normal((3, 5, 16)) * 3 + 50  # a large mean is where the fast variance fails
    scale, bias = RNG.standard_normal((2, 16))
    with jax.enable_x64(True):
        narrow = [jnp.asarray(array, dtype) for array in (x, scale, bias)]
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
        layer_norm = LayerNorm(**dtypes).apply({"params": {"scale": narrow[1], "bias": narrow[2]}}, narrow[0])
        rms_norm = RMSNorm(epsilon=1e-5, **dtypes).apply({"params": {"scale": narrow[1]}}, narrow[0])
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    assert_close(layer_norm, expected, tolerance)
    assert_close(rms_norm, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale, tolerance)


@pytest.mark.torch
@pytest.mark.parametrize("round_before_scale", [True, False])
def test_rms_norm_in_bfloat16_rounds_where_the_references_round(round_before_scale: bool) -> None:
    import torch

    x, scale = (torch.tensor(RNG.standard_normal(shape)).bfloat16() for shape in ((40, 64), (64,)))
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = scale * normed.bfloat16() if round_before_scale else (scale.float() * normed).bfloat16()
    layer = RMSNorm(round_before_scale=round_before_scale, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = {"scale": jnp.asarray(scale.float().numpy(), jnp.bfloat16)}
    out = layer.apply({"params": params}, jnp.asarray(x.float().numpy(), jnp.bfloat16))
    differing = np.asarray(out, np.float32) != expected.float().numpy()
    assert differing.mean() < 0.01  # rsqrt itself may differ in float32's last bit


def test_the_padding_row_is_read_but_does_not_learn() -> None:
    table = Embed(5, 3, padding_idx=1)
    ids = jnp.asarray([[0, 1, 4]])
    params = nn.meta.unbox(table.init(jax.random.key(0), ids))
    assert_close(table.apply(params, ids)[0, 1], params["params"]["embedding"][1], 0.0)
    gradient = jax.grad(lambda p: table.apply(p, ids).sum())(params)["params"]["embedding"]
    assert gradient.any(-1).tolist() == [True, False, False, False, True]


def test_an_id_outside_the_table_does_not_pass_silently() -> None:
    table = Embed(5, 3)
    params = nn.meta.unbox(table.init(jax.random.key(0), jnp.asarray([0])))
    assert np.isnan(table.apply(params, jnp.asarray([5]))).all()


def test_cache_contract() -> None:
    cache = KVCache.create(2, 5, [3, 1], 4, jnp.bfloat16)
    assert [layer.key.shape for layer in cache.layers] == [(2, 5, 3, 4), (2, 5, 1, 4)]
    left_padded = jnp.asarray([[False, True, True], [True, True, True]])
    cache = cache.admit(left_padded)
    mask = cache.mask(3).written_out(3, 5)
    assert mask[0, 0].astype(int).tolist() == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    written = [
        layer.write(*(jnp.ones((2, 3, *layer.key.shape[2:])) * value for value in (2, 3)), cache.index)
        for layer in cache.layers
    ]
    cache = cache.advance(3, written)
    assert int(cache.index) == 3
    assert cache.layers[0].key[0, :, 0, 0].tolist() == [2, 2, 2, 0, 0]
    assert cache.layers[1].value[1, :, 0, 0].tolist() == [3, 3, 3, 0, 0]
    cache = cache.admit(jnp.ones((2, 2), bool))
    assert cache.mask(2).written_out(2, 5)[1, 0].astype(int).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="5 slots, 3 of them used: 3 new tokens do not fit"):
        cache.admit(jnp.ones((2, 3), bool))


def test_the_next_position_is_counted_apart_where_slots_do_not_tell() -> None:
    cache = KVCache.create(2, 5, [1], 4).admit(jnp.asarray([[False, True, True], [True, True, True]]))
    assert cache.next_position.tolist() == [2, 3]
    cache = cache.replace(positions=jnp.asarray([7, 8]))
    assert cache.next_position.tolist() == [7, 8]
    assert cache.rows(jnp.asarray([1, 1, 0])).next_position.tolist() == [8, 8, 7]
