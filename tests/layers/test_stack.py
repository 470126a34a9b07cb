"""Loop and scan: the same layers, two programs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.layers.attention import attend
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.stack import make_layers, run_layers, stack_params, unstack_params
from flax_vlm.training.metrics import kept_bytes
from tests.tolerances import FLOAT64, assert_close


class Layer(nn.Module):
    @nn.compact
    def __call__(self, states: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = Dense(states.shape[-1], dtype=jnp.float64, param_dtype=jnp.float64)(states)
        return states + jnp.tanh(out) * shift, out


class Tower(nn.Module):
    scan: bool = False
    remat: Any = "none"
    depth: int = 3

    def setup(self) -> None:
        self.layers = make_layers(lambda _: Layer(), self.depth, self.scan)

    def __call__(self, states: jax.Array, gain: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        def body(layer: Layer, carry: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
            carry, out = layer(carry, shift)
            return carry * gain, out  # `gain` is shared: it comes by the closure

        return run_layers(self.layers, body, states, [jnp.float64(i + 1) for i in range(self.depth)], self.remat)


def setup() -> tuple[dict[str, Any], jax.Array]:
    states = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)))
    return nn.meta.unbox(Tower().init(jax.random.key(0), states, jnp.float64(1)))["params"], states


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scan", [False, True])
def test_what_is_kept_for_the_backward_pass(dtype: Any, scan: bool) -> None:
    """Counted in arrays of the states' size, a layer: what goes in, then four products, then what attention gives."""
    batch, length, heads, width = 3, 40, 2, 64

    class Attending(nn.Module):
        @nn.compact
        def __call__(self, states: jax.Array) -> jax.Array:
            def dense(name: str) -> Any:
                return Dense(heads * width, use_bias=False, dtype=dtype, name=name)(states)

            query, key, value = (jnp.tanh(dense(name)).reshape(batch, length, heads, width) for name in "qkv")
            attended, _ = attend(query, key, value)
            return states + jnp.tanh(Dense(heads * width, use_bias=False, dtype=dtype)(attended.reshape(states.shape)))

    class Deep(nn.Module):
        remat: Any

        def setup(self) -> None:
            self.layers = make_layers(lambda _: Attending(), 2, scan)

        def __call__(self, states: jax.Array) -> jax.Array:
            return run_layers(self.layers, lambda layer, x, _: (layer(x), None), states, [None] * 2, self.remat)[0]

    states = jax.ShapeDtypeStruct((batch, length, heads * width), dtype)
    params = jax.eval_shape(Deep("none").init, jax.random.key(0), states)
    size = states.size * states.dtype.itemsize

    def kept(remat: str) -> float:
        def loss(params: Any, states: Any) -> Any:
            return Deep(remat).apply(params, jnp.tanh(states)).astype(jnp.float32).sum()

        return kept_bytes(loss, params, states) / size / 2

    full, products, attended, everything = map(kept, ("full", "dots_no_batch", "dots", "none"))
    assert full == pytest.approx(1, abs=0.1)
    assert products == pytest.approx(5, abs=0.1)
    assert attended == pytest.approx(6, abs=0.1)
    assert everything > 8


@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_no_batch"])
def test_scan_is_loop_with_any_recomputation(remat: str, x64: None) -> None:
    params, states = setup()

    def run(scan: bool, remat: str) -> Any:
        def loss(params: Any, gain: Any) -> Any:
            tower = Tower(scan=scan, remat=remat)
            last, outputs = tower.apply({"params": stack_params(params) if scan else params}, states, gain)
            return (last**2).sum(), (last, outputs)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, 0.9)

    expected = run(False, "none")
    for scan in (False, True):
        jax.tree.map(lambda one, other: assert_close(one, other, FLOAT64), run(scan, remat), expected)


def test_scanned_parameters_start_different_and_carry_their_axis() -> None:
    boxed = Tower(scan=True).init(jax.random.key(0), jnp.ones((2, 5)), jnp.float32(1))["params"]
    kernel = boxed["layers"]["Dense_0"]["kernel"]
    assert kernel.names[0] == "layers"
    assert np.ptp(np.asarray(kernel.value), axis=0).min() > 0


def test_stack_and_unstack_are_inverse() -> None:
    rng = np.random.default_rng(0)
    layer = lambda: {"mlp": {"fc1": {"kernel": rng.standard_normal((2, 3))}}}  # noqa: E731 - reads as data
    params = {
        "text": {"encoder": {f"layers_{i}": layer() for i in range(11)}, "norm": {"scale": rng.standard_normal(3)}},
        "head": {"kernel": rng.standard_normal((3, 4))},
    }
    stacked = stack_params(params)
    assert stacked["text"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"].shape == (11, 2, 3)
    back = unstack_params(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(lambda one, other: assert_close(one, other, 1e-6), back, params)


def test_two_kinds_of_layers_are_stacked_block_by_block() -> None:
    rng = np.random.default_rng(0)
    params = {f"layers_{i}": {"mlp": rng.standard_normal((2, 3))} for i in range(12)}
    params |= {f"gated_layers_{i}": {"alpha": rng.standard_normal(5)} for i in range(4)}
    params |= {"norm": {"scale": rng.standard_normal(3)}, "tower": {"layers_0": {"k": rng.standard_normal(2)}}}
    stacked = stack_params(params)
    assert stacked.keys() == {"blocks", "norm", "tower"} and stacked["tower"].keys() == {"layers"}
    blocks = stacked["blocks"]
    assert blocks.keys() == {"gated_layers", "layers_0", "layers_1", "layers_2"}
    assert_close(blocks["layers_1"]["mlp"][2], params["layers_7"]["mlp"], 1e-6)  # of block 2, its second layer
    assert_close(blocks["gated_layers"]["alpha"][3], params["gated_layers_3"]["alpha"], 1e-6)
    back = unstack_params(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(lambda one, other: assert_close(one, other, 1e-6), back, params)
    assert stack_params({f"{kind}_{i}": {"k": np.ones(2)} for kind in ("layers", "a_layers") for i in range(2)})[
        "blocks"
    ].keys() == {"layers", "a_layers"}


def test_names_that_end_in_a_number_are_not_all_layers() -> None:
    params = {"layer_norm1": {"scale": np.ones(2)}, "Dense_0": {"kernel": np.ones(2)}}
    assert stack_params(params).keys() == params.keys()


def test_what_cannot_be_is_refused(x64: None, unchecked_types: None) -> None:
    params, states = setup()
    with pytest.raises(ValueError, match="unknown remat 'some'"):
        Tower(remat="some").apply({"params": params}, states, 1.0)
    with pytest.raises(ValueError, match=r"layers_0 \.\.\. differ in shape"):
        stack_params({"layers_0": {"k": np.ones(2)}, "layers_1": {"k": np.ones(3)}})
