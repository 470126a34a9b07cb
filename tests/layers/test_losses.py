"""The loss of language models against its formula, position by position, and in chunks of words against the whole."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.layers.linear import matmul
from flax_vlm.layers.losses import mean_loss, next_token_sums, next_token_sums_in_chunks
from tests.tolerances import BFLOAT16_RATIO, FLOAT32, FLOAT64, assert_close

B, T, V = 3, 6, 9
RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.standard_normal((B, T, V)) * 3, RNG.integers(0, V, (B, T))
MASKS = {
    "none": None,
    "right padding": np.array([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5]),
    "left padding": np.array([[1] * 6, [0] * 2 + [1] * 4, [0] * 5 + [1]]),
    "booleans": np.array([[True] * 6, [False, True] * 3, [True] * 6]),
}
SEGMENTS = np.array([[1, 1, 2, 2, 2, 3], [1, 1, 1, 2, 0, 0], [0, 1, 1, 1, 1, 2]])


def by_hand(mask: np.ndarray | None, labels: np.ndarray, segments: np.ndarray | None = None) -> tuple[float, int]:
    losses = []
    for b in range(B):
        for t in range(T - 1):
            counts = labels[b, t + 1] != -100 and (mask is None or mask[b, t + 1])
            if segments is not None:
                counts = counts and segments[b, t + 1] != 0 and segments[b, t] == segments[b, t + 1]
            if counts:
                weights = np.exp(LOGITS[b, t])
                losses.append(-np.log(weights[labels[b, t + 1]] / weights.sum()))
    return float(np.sum(losses)), len(losses)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "segments"])
@pytest.mark.parametrize("name", MASKS)
def test_next_tokens_that_are_no_padding_count(name: str, segments: np.ndarray | None, x64: None) -> None:
    """With padding on the left, the last of it predicts the first token, and counts."""
    labels = LABELS.copy()
    labels[0, 2] = labels[1, 0] = -100
    mask, ids = (None if each is None else jnp.asarray(each) for each in (MASKS[name], segments))
    total, count = next_token_sums(jnp.asarray(LOGITS), jnp.asarray(labels), mask, ids)
    expected = by_hand(MASKS[name], labels, segments)
    assert count == expected[1]
    assert_close(total, expected[0], FLOAT64)


def test_nothing_to_predict_costs_nothing() -> None:
    def loss(logits: jax.Array) -> jax.Array:
        return mean_loss(*next_token_sums(logits, jnp.full((B, T), -100)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(LOGITS, jnp.float32))
    assert value == 0 and not gradient.any()


def test_labels_outside_the_vocabulary_do_not_pass_silently() -> None:
    assert jnp.isnan(next_token_sums(jnp.asarray(LOGITS), jnp.asarray(LABELS + V))[0])
    in_chunks = jax.jit(partial(next_token_sums_in_chunks, chunk=4))
    for labels in (LABELS + V, LABELS - V):
        assert jnp.isnan(in_chunks(jnp.ones((B, T, 2)), [jnp.ones((2, V))], jnp.asarray(labels))[0])


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    loss, _ = next_token_sums(logits, jnp.asarray(LABELS))
    assert loss.dtype == jnp.float32
    assert loss == next_token_sums(logits.astype(jnp.float32), jnp.asarray(LABELS))[0]


D, MAIN, ADDITIONAL = 5, 37, 3
STATES = RNG.standard_normal((2, 7, D))
KERNELS = RNG.standard_normal((D, MAIN)), RNG.standard_normal((D, ADDITIONAL))
WORDS = np.append(RNG.integers(0, MAIN + ADDITIONAL, (2, 5)), [[0, -100], [MAIN + ADDITIONAL - 1, MAIN]], axis=1)
TAIL = np.array([[1] * 7, [1] * 5 + [0] * 2])


def plain(states: Any, tables: Any, labels: Any, *masks: Any, words_first: bool = False) -> Any:
    logits = [matmul(states, (table.T if words_first else table).astype(states.dtype)) for table in tables]
    return next_token_sums(jnp.concatenate(logits, axis=-1), labels, *masks)


def with_gradients(sums: Any, *inputs: Any) -> Any:
    """((loss, count), gradients of states and tables)."""

    def loss(states: Any, tables: Any) -> Any:
        total, count = sums(states, tables, *inputs)
        return mean_loss(total, count), count

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("words_first", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("tables", [1, 2])
def test_chunks_equal_the_whole(tables: int, words_first: bool, x64: None) -> None:
    """Chunks that divide the vocabulary, that do not, of one word, and larger than all of it."""
    kernels = [jnp.asarray(kernel.T if words_first else kernel) for kernel in KERNELS[:tables]]
    labels = jnp.asarray(np.where(WORDS < MAIN, WORDS, WORDS if tables == 2 else 1))
    inputs = labels, jnp.asarray(TAIL)
    expected = with_gradients(partial(plain, words_first=words_first), *inputs)(jnp.asarray(STATES), kernels)
    for chunk in (8, 37, 1, 100):
        sums = partial(next_token_sums_in_chunks, chunk=chunk, words_first=words_first)
        actual = with_gradients(sums, *inputs)(jnp.asarray(STATES), kernels)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(one, other, FLOAT64, f"chunks of {chunk}")


def test_bfloat16_chunks_are_as_close_to_float64_as_the_whole() -> None:
    """By the RMS of their errors over ten draws: the gradients of states and of float32 kernels.

    The loss itself is as good as one in float32 either way: the compiler does not round logits that a sum follows. The
    gradients of states are rounded at the same two places (one sum in another order may fall on the other side), those
    of kernels at one less.
    """
    rng, errors = np.random.default_rng(1), []
    labels = jnp.asarray(rng.integers(0, 96, (2, 24)))
    in_chunks = with_gradients(partial(next_token_sums_in_chunks, chunk=16), labels)
    whole = with_gradients(plain, labels)
    for _ in range(10):
        states = jnp.asarray(rng.standard_normal((2, 24, 32)), jnp.bfloat16)
        kernel = jnp.asarray(0.5 * rng.standard_normal((32, 96)), jnp.bfloat16).astype(jnp.float32)
        found = [jax.tree.leaves(each(states, [kernel])) for each in (in_chunks, whole)]
        with jax.enable_x64(True):
            exact = jax.tree.leaves(whole(states.astype(jnp.float64), [kernel.astype(jnp.float64)]))
        errors.append(
            [[_squared(one, other) for one, other in zip(each[2:], exact[2:], strict=True)] for each in found]
        )
        assert_close(found[0][0], exact[0], FLOAT32, "loss")
    own, other = np.sqrt(np.mean(errors, axis=0))
    assert own[0] <= 1.001 * other[0] and own[1] <= BFLOAT16_RATIO * other[1], f"{own} against {other}"


def _squared(one: Any, other: Any) -> float:
    return float(np.mean(np.square(np.asarray(one, np.float64) - np.asarray(other))))


def test_neither_logits_nor_a_copy_of_the_kernel_exist() -> None:
    """As the compiler counts temporary memory of the gradient, float32 kernels and states in either dtype."""
    tokens, width, words, chunk = 512, 64, 8192, 256
    labels = jnp.zeros((1, tokens), jnp.int32)
    kernel = jax.ShapeDtypeStruct((width, words), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        states = jax.ShapeDtypeStruct((1, tokens, width), dtype)
        memory = [
            jax.jit(jax.grad(lambda *args, sums=sums: sums(*args)[0], argnums=(0, 1)))
            .lower(states, [kernel], labels)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for sums in (plain, partial(next_token_sums_in_chunks, chunk=chunk))
        ]
        assert memory[1] < kernel.size * 4, f"{memory[1]} bytes"
        assert memory[1] * 10 < memory[0], f"{memory[1]} bytes in chunks, {memory[0]} for the whole"
