"""Gated cross-attention against its formula, its gates, and tokens that see nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.layers.gated_cross_attention import GatedCrossAttention, alpha_init
from tests.tolerances import FLOAT64, assert_close

B, T, NUM_IMAGES, P, D, E, N, F = 2, 5, 3, 4, 12, 10, 3, 14
RNG = np.random.default_rng(0)
STATES, IMAGES = RNG.standard_normal((B, T, D)), RNG.standard_normal((B, NUM_IMAGES * P, E))
# Of every kind: a token of several images, of one, of none; the second row sees nothing at all.
SEES = np.array([[[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], [[0] * 3] * 5], bool)


def layer_of(**changes: Any) -> GatedCrossAttention:
    attributes: dict[str, Any] = {
        "num_heads": N,
        "hidden_size": D,
        "intermediate_size": F,
        "hidden_act": "relu",
        "alpha_type": "vector",
        "alpha_init": alpha_init("normal", 1.0),
        "qk_layer_norms": True,
        "rms_norm_eps": 1e-6,
        "dtype": jnp.float64,
        "param_dtype": jnp.float64,
    }
    return GatedCrossAttention(**attributes | changes)


def run(layer: GatedCrossAttention, states: Any, images: Any, sees: Any) -> jax.Array:
    """The images, if any, projected and looked at."""
    return layer(states, None if images is None else layer.project(images), None if sees is None else jnp.asarray(sees))


def params_of(layer: GatedCrossAttention) -> Any:
    arrays = [jnp.asarray(array, layer.param_dtype) for array in (STATES, IMAGES)]
    return nn.meta.unbox(jax.jit(lambda key: layer.init(key, *arrays, SEES, method=run))(jax.random.key(0)))["params"]


def apply(layer: GatedCrossAttention, params: Any, images: Any = IMAGES, sees: Any = SEES) -> jax.Array:
    arrays = [None if array is None else jnp.asarray(array) for array in (STATES, images, sees)]
    return jax.jit(lambda p, *arrays: layer.apply({"params": p}, *arrays, method=run))(params, *arrays)


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def by_hand(params: Any, sees: np.ndarray) -> np.ndarray:
    p = jax.tree.map(np.asarray, params)
    attention = p["cross_attn"]

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        split = (x @ attention[f"{name}_proj"]["kernel"]).reshape(*x.shape[:2], N, D // N)
        return rms(split, attention[f"{name}_layer_norm"]["scale"]) if name in "qk" else split

    query = heads(rms(STATES, p["input_layernorm"]["scale"]), "q")
    key, value = heads(IMAGES, "k"), heads(IMAGES, "v")
    attended = np.zeros((B, T, D))
    for b, t in zip(*np.nonzero(sees.any(-1)), strict=True):
        seen = np.repeat(sees[b, t], P)
        for n in range(N):
            weights = np.exp(key[b, seen, n] @ query[b, t, n] / np.sqrt(D // N))
            attended[b, t, n * D // N : (n + 1) * D // N] = weights @ value[b, seen, n] / weights.sum()
    states = STATES + np.tanh(p["alpha_cross_attn"]) * (attended @ attention["o_proj"]["kernel"])
    normed, mlp = rms(states, p["post_attention_layernorm"]["scale"]), p["mlp"]
    inner = np.maximum(normed @ mlp["gate_proj"]["kernel"], 0) * (normed @ mlp["up_proj"]["kernel"])
    return states + np.tanh(p["alpha_dense"]) * (inner @ mlp["down_proj"]["kernel"])


def test_the_formula(x64: None) -> None:
    layer = layer_of()
    params = params_of(layer)
    assert_close(apply(layer, params), by_hand(params, SEES), FLOAT64)
    # A mask with a column for every image token says more, and here the same.
    assert_close(apply(layer, params, sees=np.repeat(SEES, P, axis=-1)), by_hand(params, SEES), FLOAT64)


def test_tokens_that_see_nothing_take_exactly_nothing(x64: None) -> None:
    layer = layer_of()
    params = params_of(layer)
    out, alone = np.asarray(apply(layer, params)), np.asarray(apply(layer, params, None, None))
    blind = ~SEES.any(-1)
    np.testing.assert_array_equal(out[blind], alone[blind])
    assert (out[~blind] != alone[~blind]).any(-1).all()
    assert (alone != STATES).any(-1).all(), "the MLP runs for all"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gradients_where_nothing_is_seen_are_finite(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        layer = layer_of(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
        arrays = [jnp.asarray(array, dtype) for array in (STATES, IMAGES)]

        def total(params: Any, states: Any, images: Any) -> Any:
            return layer.apply({"params": params}, states, images, SEES, method=run).astype(jnp.float32).sum()

        value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(params_of(layer), *arrays)
        assert np.isfinite(value)
        for gradient in jax.tree.leaves(gradients):
            assert gradient.dtype == dtype and np.isfinite(np.asarray(gradient, float)).all()
        assert not np.asarray(gradients[2])[1].any(), "a row that sees no image teaches it nothing"


def test_shut_gates_leave_all_as_it_was(x64: None) -> None:
    layer = layer_of(alpha_init=alpha_init("zeros", 0.0), alpha_type="float")
    np.testing.assert_array_equal(apply(layer, params_of(layer)), STATES)


def test_dropout_falls_on_weights_and_on_what_is_added(x64: None) -> None:
    layer = layer_of(dropout=0.5)
    params = params_of(layer) | {"alpha_dense": jnp.zeros((1, 1, D))}
    sees = jnp.ones((B, T, NUM_IMAGES), bool)

    def add(layer: GatedCrossAttention, states: Any, images: Any, deterministic: bool) -> jax.Array:
        return layer(states, layer.project(images), sees, deterministic) - states

    def attend(layer: GatedCrossAttention, states: Any, images: Any, deterministic: bool) -> jax.Array:
        return layer.cross_attn(states, layer.project(images), sees, deterministic)

    def draw(method: Any, seed: int | None) -> np.ndarray:
        rngs = {} if seed is None else {"dropout": jax.random.key(seed)}
        arrays = jnp.asarray(STATES), jnp.asarray(IMAGES), seed is None
        return np.asarray(layer.apply({"params": params}, *arrays, method=method, rngs=rngs))

    assert 0.35 < (draw(add, 0) == 0).mean() < 0.65 and not (draw(add, None) == 0).any()
    assert (draw(attend, 0) != draw(attend, 1)).all() and (draw(attend, 0) != draw(attend, None)).all()


@pytest.mark.parametrize("kind", ["float", "vector"])
@pytest.mark.parametrize("start", ["zeros", "ones", "normal", "gaussian", "random"])
def test_gates_start_as_they_are_told(start: Any, kind: Any) -> None:
    layer = layer_of(
        alpha_type=kind, alpha_init=alpha_init(start, 0.3), hidden_size=120, dtype=jnp.float32, param_dtype=jnp.float32
    )
    arrays = jnp.zeros((1, 1, 120)), jnp.zeros((1, 1, E)), np.ones((1, 1, 1), bool)
    params = nn.meta.unbox(jax.jit(lambda key: layer.init(key, *arrays, method=run))(jax.random.key(0)))["params"]
    gates = [np.asarray(params[name]) for name in ("alpha_cross_attn", "alpha_dense")]
    assert [gate.shape for gate in gates] == [(1,) if kind == "float" else (1, 1, 120)] * 2
    values = np.concatenate([gate.ravel() for gate in gates])
    if start in ("zeros", "ones"):
        assert (values == (start == "ones")).all()
    else:
        assert np.unique(values).size == values.size and np.abs(values).max() < 1.5
        assert kind == "float" or 0.24 < values.std() < 0.36


def test_what_cannot_be_is_refused(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match="unknown alpha type 'scalar': expected one of float, vector"):
        params_of(layer_of(alpha_type="scalar", dtype=jnp.float32, param_dtype=jnp.float32))
    with pytest.raises(ValueError, match="unknown alpha initializer 'uniform': expected one of zeros, ones"):
        alpha_init("uniform", 0.1)  # pyright: ignore[reportArgumentType] - the point of the test
