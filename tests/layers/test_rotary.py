"""Rotary positions against complex multiplication, and against torch's angles in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.layers.rotary import rotate, rotate_interleaved, rotation
from tests.tolerances import FLOAT64, assert_close

B, T, N, H, THETA = 2, 7, 3, 10, 500.0
RNG = np.random.default_rng(0)


def test_pairs_turn_like_complex_numbers(x64: None) -> None:
    states = RNG.standard_normal((B, T, N, H))
    positions = RNG.integers(0, 100_000, (B, T))
    out = rotate(jnp.asarray(states), rotation(jnp.asarray(positions), H, THETA, jnp.float64))
    numbers = states[..., : H // 2] + 1j * states[..., H // 2 :]
    turned = numbers * np.exp(1j * positions[..., None, None] * THETA ** (-2 * np.arange(H // 2) / H))
    assert_close(out, np.concatenate([turned.real, turned.imag], -1), FLOAT64)


def test_neighbours_turn_like_complex_numbers_and_the_rest_stays(x64: None) -> None:
    states = RNG.standard_normal((B, T, N, H))
    positions, turning = RNG.integers(0, 100_000, (B, T)), 4
    out = rotate_interleaved(jnp.asarray(states), rotation(jnp.asarray(positions), turning, THETA, jnp.float64))
    numbers = states[..., :turning:2] + 1j * states[..., 1:turning:2]
    numbers *= np.exp(1j * positions[..., None, None] * THETA ** (-2 * np.arange(turning // 2) / turning))
    turned = np.stack([numbers.real, numbers.imag], -1).reshape(B, T, N, turning)
    assert_close(out, np.concatenate([turned, states[..., turning:]], -1), FLOAT64)


def test_only_distances_count(x64: None) -> None:
    query, key = (jnp.asarray(RNG.standard_normal((1, T, N, H))) for _ in range(2))

    def scores(offset: int) -> np.ndarray:
        by = rotation(jnp.arange(T)[None] + offset, H, THETA, jnp.float64)
        return np.asarray(jnp.einsum("btnh,bsnh->bnts", rotate(query, by), rotate(key, by)))

    assert_close(scores(1234), scores(0), FLOAT64)


@pytest.mark.torch
@pytest.mark.parametrize("theta, head_dim", [(10_000.0, 128), (10_000.0, 12), (500.0, 96)])
def test_float32_angles_are_those_of_the_references(theta: float, head_dim: int) -> None:
    """One bit of a frequency, which differs between libraries, is worth 2e-4 at position 4000; not more than one."""
    import torch

    positions = np.arange(4096)
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    angles = torch.tensor(positions)[:, None].float() * frequencies
    by = rotation(jnp.asarray(positions)[None], head_dim, theta, jnp.float32)
    for ours, theirs in ((by.cos, angles.cos()), (by.sin, angles.sin())):
        np.testing.assert_allclose(ours[0, :, 0], theirs, rtol=0, atol=3e-4)


def test_bfloat16_rounds_the_turned_angle_only() -> None:
    """An angle of 4001 in bfloat16 would be 4000."""
    positions = jnp.asarray([[4001]])
    half, wide = (rotation(positions, H, THETA, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.cos.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.cos, wide.cos.astype(jnp.bfloat16))
