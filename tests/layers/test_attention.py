"""attend(): every implementation, mask and shape against the formula, written out in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.layers import attention, blocked_attention
from flax_vlm.layers.attention import (
    Mask,
    attend,
    causal_mask,
    combine_masks,
    length_mask,
    padding_mask,
    segment_mask,
)
from tests.tolerances import FLOAT32_REORDERED, FLOAT64, assert_close

B, T, S, N, K, H = 3, 7, 11, 6, 2, 5
IMPLEMENTATIONS = ("xla", "blocked", "auto")


def arrays(dtype: Any = np.float64, heads: int = K) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, S, heads, H), (B, S, heads, H))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def by_hand(query: Any, key: Any, value: Any, mask: Any = None, bias: Any = 0.0, scale: float | None = None) -> Any:
    """Head by head, row by row."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    mask = np.ones((B, N, T, S), bool) if mask is None else np.broadcast_to(mask, (B, N, T, S))
    bias = np.broadcast_to(bias, (B, N, T, S))
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for n in range(N):
            group = n // (N // key.shape[2])
            for t in range(T):
                seen = mask[b, n, t]
                if seen.any():
                    scores = key[b, seen, group] @ query[b, t, n] * (H**-0.5 if scale is None else scale)
                    weights = np.exp(scores + bias[b, n, t, seen])
                    out[b, t, n] = weights @ value[b, seen, group] / weights.sum()
    return out


RNG = np.random.default_rng(1)
RAW_MASKS = {
    "padding": RNG.random((B, 1, 1, S)) < 0.6,
    "one for all rows": RNG.random((1, 1, T, S)) < 0.6,
    "per head": RNG.random((B, N, T, S)) < 0.3,
    "rows that see nothing": (RNG.random((B, 1, T, S)) < 0.5) & (np.arange(T) % 3 != 0)[:, None],
    "nothing at all": np.zeros((B, 1, 1, S), bool),
}
MASKS = {"none": None} | {name: jnp.asarray(mask) for name, mask in RAW_MASKS.items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three queries (7 = 3 + 3 + 1), and "auto" blocks too."""
    monkeypatch.setattr(blocked_attention, "_BLOCK_SCORES", 3 * N * S)
    monkeypatch.setattr(attention, "_SMALL", 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, implementation: Any, x64: None) -> None:
    out, weights = attend(*arrays(), mask=MASKS[mask], implementation=implementation)
    assert weights is None
    expected = by_hand(*arrays(), MASKS[mask])
    if expected.any():
        assert_close(out, expected, FLOAT64)
    assert not np.asarray(out)[~expected.any(-1)].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_shared_heads_bias_and_scale(heads: int, implementation: Any, x64: None) -> None:
    bias = RNG.standard_normal((B, N, T, S))
    out, _ = attend(*arrays(heads=heads), bias=jnp.asarray(bias), scale=0.3, implementation=implementation)
    assert_close(out, by_hand(*arrays(heads=heads), bias=bias, scale=0.3), FLOAT64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_and_lengths_must_both_allow(implementation: Any, x64: None) -> None:
    lengths = jnp.asarray([2, 5, 0])
    out, _ = attend(*arrays(), causal=True, key_value_lengths=lengths, implementation=implementation)
    allowed = (np.arange(S) <= np.arange(T)[:, None]) & (np.arange(S) < np.asarray(lengths)[:, None, None])
    assert_close(out, by_hand(*arrays(), allowed[:, None]), FLOAT64)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_agree_and_are_finite(mask: str, x64: None) -> None:
    def loss(implementation: Any) -> Any:
        def total(*qkv: jax.Array) -> jax.Array:
            out, _ = attend(*qkv, mask=MASKS[mask], implementation=implementation)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

        return jax.grad(total, argnums=(0, 1, 2))(*arrays())

    for one, other in zip(loss("blocked"), loss("xla"), strict=True):
        assert_close(one, other, FLOAT64)


def test_gradients_of_a_bias_and_of_shared_heads(x64: None) -> None:
    bias = jnp.asarray(RNG.standard_normal((1, N, T, S)))

    def gradients(implementation: Any, *biases: jax.Array) -> Any:
        def total(query: jax.Array, key: jax.Array, value: jax.Array, *biases: jax.Array) -> jax.Array:
            how = {"bias": biases[0] if biases else None, "causal": not biases, "implementation": implementation}
            out, _ = attend(query, key, value, **how)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

        return jax.grad(total, argnums=tuple(range(3 + len(biases))))(*arrays(heads=2), *biases)

    for biases in ([], [bias]):
        for one, other in zip(gradients("blocked", *biases), gradients("xla", *biases), strict=True):
            assert_close(one, other, FLOAT64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_nan_where_nothing_may_be_attended(dtype: str, implementation: Any) -> None:
    def total(*qkv: jax.Array) -> jax.Array:
        out, _ = attend(*qkv, mask=MASKS["rows that see nothing"], implementation=implementation)
        return out.astype(jnp.float32).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*arrays(dtype))
    assert np.isfinite(value)
    for gradient in gradients:
        assert gradient.dtype == dtype
        assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_weights_are_those_that_were_used(x64: None) -> None:
    query, key, value = arrays(heads=N)
    out, weights = attend(query, key, value, mask=MASKS["padding"], return_weights=True)
    assert weights is not None and weights.shape == (B, N, T, S)
    assert_close(jnp.einsum("bnts,bsnh->btnh", weights, value), out, FLOAT64)
    dropped, used = attend(query, key, value, dropout_rate=0.4, dropout_rng=jax.random.key(0), return_weights=True)
    assert used is not None and 0.3 < (np.asarray(used) == 0).mean() < 0.5
    assert_close(jnp.einsum("bnts,bsnh->btnh", used, value), dropped, FLOAT64)
    plain, _ = attend(query, key, value, dropout_rate=0.4)  # without a key there is no dropout
    assert_close(plain, by_hand(query, key, value), FLOAT64)


def test_auto_blocks_on_a_cpu_and_is_decided_when_lowered() -> None:
    jitted = jax.jit(lambda *qkv: attend(*qkv)[0])
    assert_close(jitted(*arrays(np.float32)), by_hand(*arrays(np.float32)), FLOAT32_REORDERED)
    traced = jitted.trace(*arrays(np.float32))
    assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "while" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_mask_builders() -> None:
    def written(mask: Mask | None, num_queries: int, num_keys: int) -> Any:
        assert mask is not None
        allowed = mask.written_out(num_queries, num_keys)
        assert allowed is not None
        return allowed.astype(int).tolist()

    assert written(causal_mask(2, 4, 1), 2, 4) == [[[[1, 1, 0, 0], [1, 1, 1, 0]]]]
    assert written(causal_mask(2, 3), 2, 3) == [[[[1, 0, 0], [1, 1, 0]]]]
    assert written(padding_mask(jnp.asarray([[1, 0], [1, 1]])), 2, 2) == [[[[1, 0]]], [[[1, 1]]]]
    assert written(padding_mask(jnp.ones((2, 3, 4))), 3, 4) == [[[[1] * 4] * 3]] * 2
    assert written(length_mask(jnp.asarray([0, 2]), 3), 1, 3) == [[[[0] * 3]], [[[1, 1, 0]]]]
    packed = segment_mask(jnp.asarray([[1, 1, 2, 0]]))
    assert written(packed, 4, 4) == [[[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0] * 4]]]
    assert combine_masks(None, None) is None and Mask().written_out(2, 2) is None
    with pytest.raises(ValueError, match=r"shape \(2,\): expected \[batch, keys\]"):
        padding_mask(jnp.ones(2))


def test_masks_join_with_each_other_and_with_arrays() -> None:
    array = RNG.random((2, 1, 1, 4)) < 0.6
    first, second = jnp.asarray([[1, 1, 1, 2], [1, 1, 2, 2]]), jnp.asarray([[1, 2, 2, 2], [3, 3, 3, 0]])
    joined = jnp.asarray(array) & segment_mask(first) & causal_mask(4, 4) & segment_mask(second)
    expected = array & np.tri(4, dtype=bool)
    for ids in (np.asarray(first), np.asarray(second)):
        expected = expected & ((ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None])[:, None]
    assert joined.causal and joined.segments is not None
    np.testing.assert_array_equal(joined.written_out(4, 4), expected)


def test_what_cannot_be_is_refused(unchecked_types: None) -> None:
    query, key, value = arrays(np.float32)
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        attend(query, key, value, implementation="flash")  # pyright: ignore[reportArgumentType] - the point of the test
    with pytest.raises(ValueError, match="'xla' only"):
        attend(query, key, value, implementation="blocked", return_weights=True)
    with pytest.raises(ValueError, match=r"expected \[B T N H\]"):
        attend(query, key, value[:, :-1])
    with pytest.raises(ValueError, match="6 query heads cannot share 4"):
        attend(query, *(jnp.zeros((B, S, 4, H)),) * 2)
