"""The loss of language models against its formula, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.layers.losses import next_token_loss
from tests.tolerances import FLOAT64, assert_close

B, T, V = 3, 6, 9
RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.standard_normal((B, T, V)) * 3, RNG.integers(0, V, (B, T))
MASKS = {
    "none": None,
    "right padding": np.array([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5]),
    "left padding": np.array([[1] * 6, [0] * 2 + [1] * 4, [0] * 5 + [1]]),
    "booleans": np.array([[True] * 6, [False, True] * 3, [True] * 6]),
}


def by_hand(mask: np.ndarray | None, labels: np.ndarray) -> float:
    losses = []
    for b in range(B):
        for t in range(T - 1):
            if labels[b, t + 1] != -100 and (mask is None or mask[b, t + 1]):
                weights = np.exp(LOGITS[b, t])
                losses.append(-np.log(weights[labels[b, t + 1]] / weights.sum()))
    return float(np.mean(losses))


@pytest.mark.parametrize("name", MASKS)
def test_next_tokens_that_are_no_padding_count(name: str, x64: None) -> None:
    """With padding on the left, the last of it predicts the first token, and counts."""
    labels = LABELS.copy()
    labels[0, 2] = labels[1, 0] = -100
    mask = None if MASKS[name] is None else jnp.asarray(MASKS[name])
    loss = next_token_loss(jnp.asarray(LOGITS), jnp.asarray(labels), mask)
    assert_close(loss, by_hand(MASKS[name], labels), FLOAT64)


def test_nothing_to_predict_costs_nothing() -> None:
    ignored = jnp.full((B, T), -100)
    value, gradient = jax.value_and_grad(next_token_loss)(jnp.asarray(LOGITS, jnp.float32), ignored)
    assert value == 0 and not gradient.any()


def test_labels_outside_the_vocabulary_do_not_pass_silently() -> None:
    assert jnp.isnan(next_token_loss(jnp.asarray(LOGITS), jnp.asarray(LABELS + V)))


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = next_token_loss(logits, jnp.asarray(LABELS))
    assert loss.dtype == jnp.float32
    assert loss == next_token_loss(logits.astype(jnp.float32), jnp.asarray(LABELS))
