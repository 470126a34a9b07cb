"""A row or two times the bits of bfloat16: the same products, and no second copy of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.layers import few_rows, linear
from flax_vlm.layers.few_rows import UNROLLED, Bits, for_few_rows
from tests.tolerances import FLOAT32, assert_close

RNG = np.random.default_rng(0)
FEATURES = 5


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "LARGE", 0)


def floats(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.bfloat16)


def bits(kernel: jax.Array) -> Bits:
    found = for_few_rows({"layer": {"kernel": kernel}}, 1)["layer"]["kernel"]
    assert isinstance(found, Bits) and found.shape == kernel.shape
    return found


@pytest.mark.parametrize("width", [3, UNROLLED, 2 * UNROLLED + 3])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (2, 3)])
def test_a_product(rows: tuple[int, ...], width: int) -> None:
    kernel, bias, inputs = floats(width, FEATURES), floats(FEATURES), floats(*rows, width)
    exact = np.asarray(inputs, np.float64) @ np.asarray(kernel, np.float64)
    assert_close(bits(kernel).product(inputs), exact, FLOAT32)
    wide = inputs.astype(jnp.float32)
    assert_close(linear.matmul(wide, bits(kernel)), exact, FLOAT32)
    found = linear.matmul(inputs, bits(kernel), bias)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact + np.asarray(bias), rtol=2**-8, atol=1e-5)


def test_every_value_of_bfloat16() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    expected = patterns.view(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(few_rows._as_float32(jnp.asarray(patterns[None])))[0], expected)


def test_only_large_kernels_of_bfloat16_and_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "LARGE", 12)
    params = {
        "layer": {"kernel": floats(4, 3), "bias": floats(3)},
        "words": {"embedding": floats(6, 4)},
        "small": {"kernel": floats(4, 2)},
        "layers": {"kernel": floats(2, 4, 3)},
        "wide": {"kernel": floats(4, 3).astype(jnp.float32)},
    }
    assert for_few_rows(params, few_rows.FEW + 1) is params
    made = for_few_rows(params, few_rows.FEW)
    kernel: Any = params["layer"]["kernel"]
    assert made["layer"]["kernel"].values.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()
    made["layer"]["kernel"] = kernel
    jax.tree.map(lambda one, other: None if one is other else pytest.fail(f"{one.shape} is another"), made, params)
