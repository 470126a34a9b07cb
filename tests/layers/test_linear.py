"""Products of bfloat16: summed in float32 both ways, with gradients that take the place of those of float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_vlm.layers.linear import Dense, matmul, product

# Shapes of both sides, and (summed axes of each, batch axes of each).
PRODUCTS = {
    "a kernel": ((2, 5, 7), (7, 3), (((2,), (0,)), ((), ()))),
    "scores of grouped heads": ((2, 5, 4, 3, 7), (2, 6, 4, 7), (((4,), (3,)), ((0, 2), (0, 2)))),
    "weights and values": ((2, 4, 5, 3, 6), (2, 6, 4, 7), (((4,), (1,)), ((0, 1), (0, 2)))),
    "axes in any order": ((7, 5, 2, 9), (9, 2, 6, 7), (((0, 3), (3, 0)), ((2,), (1,)))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_gradients_are_exact_where_nothing_is_rounded(name: str) -> None:
    """Small integers, whose sums bfloat16 holds no more, and float32 does."""
    *shapes, dimensions = PRODUCTS[name]
    rng = np.random.default_rng(0)
    sides = [jnp.asarray(rng.integers(-15, 16, shape), jnp.bfloat16) for shape in shapes]

    def exact(*sides: jax.Array) -> jax.Array:
        return lax.dot_general(*(side.astype(jnp.float32) for side in sides), dimensions)

    found, found_gradients = jax.vjp(lambda *sides: product(*sides, dimensions), *sides)
    expected, gradients = jax.vjp(exact, *sides)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    cotangent = jnp.asarray(rng.integers(-3, 4, expected.shape), jnp.float32)
    for one, other in zip(found_gradients(cotangent), gradients(cotangent), strict=True):
        assert one.dtype == other.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one, other)


def test_nothing_is_multiplied_in_float32() -> None:
    """Forward or backward: a product of mixed dtypes would run at half of the speed."""
    layer = Dense(5, dtype=jnp.bfloat16)
    inputs = jnp.ones((2, 3, 4), jnp.bfloat16)
    params = layer.init(jax.random.key(0), inputs)

    def loss(params: Any, inputs: jax.Array) -> Any:
        out = layer.apply(params, inputs)
        assert out.dtype == jnp.bfloat16
        return out.astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(params, inputs).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2  # of the sum, forward needs none
    assert not any("f32" in line.split(" : ")[1].split("->")[0] for line in products)


def test_a_master_kernel_has_its_gradient_unrounded() -> None:
    """2,049 rows of ones: a sum that bfloat16 would round to 2,048."""
    rows = jnp.ones((2049, 3), jnp.bfloat16)
    kernel, bias = jnp.zeros((3, 2), jnp.float32), jnp.zeros(2, jnp.float32)

    def loss(kernel: jax.Array, bias: jax.Array) -> Any:
        return matmul(rows, kernel, bias).astype(jnp.float32).sum()

    gradients = jax.grad(loss, (0, 1))(kernel, bias)
    for gradient in gradients:
        assert gradient.dtype == jnp.float32
        np.testing.assert_array_equal(gradient, np.full(gradient.shape, 2049))
