"""Contrastive losses in chunks against their formulas over all pairs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.layers.contrastive import sigmoid_contrastive_sum, softmax_contrastive_sum
from flax_vlm.models.altclip.model import contrastive_loss
from tests.tolerances import FLOAT64, assert_close

B, E, BIAS = 6, 5, -2.5
RNG = np.random.default_rng(0)
TEXTS, IMAGES, SCALE = RNG.standard_normal((B, E)), RNG.standard_normal((B, E)), np.float64(2.3)


def softmax(texts: Any, images: Any, scale: Any) -> Any:
    return contrastive_loss(texts @ images.T * scale) * len(texts)


def sigmoid(texts: Any, images: Any, scale: Any) -> Any:
    """Algorithm 1 of arXiv:2303.15343, times the number of pairs."""
    logits = texts @ images.T * scale + BIAS
    return -jax.nn.log_sigmoid((2 * jnp.eye(len(texts), dtype=logits.dtype) - 1) * logits).sum()


KINDS = {
    "softmax": (softmax, softmax_contrastive_sum),
    "sigmoid": (sigmoid, partial(sigmoid_contrastive_sum, bias=BIAS)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_formula(kind: str, x64: None) -> None:
    plain, in_chunks = KINDS[kind]
    inputs = [jnp.asarray(each) for each in (TEXTS, IMAGES, SCALE)]
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*inputs)
    for chunk in (0, 1, 2):
        actual = jax.jit(jax.value_and_grad(partial(in_chunks, chunk=chunk), argnums=(0, 1, 2)))(*inputs)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(one, other, FLOAT64, f"chunks of {chunk}")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_all_pairs_do_not_exist(kind: str) -> None:
    """As the compiler counts temporary memory of the gradient."""
    plain, in_chunks = KINDS[kind]
    side, scale = jax.ShapeDtypeStruct((1024, 16), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    memory = [
        jax.jit(jax.grad(each, argnums=(0, 1))).lower(side, side, scale).compile().memory_analysis().temp_size_in_bytes
        for each in (plain, partial(in_chunks, chunk=32))
    ]
    assert memory[1] * 6 < memory[0], f"{memory[1]} bytes in chunks, {memory[0]} for the whole"


def test_what_does_not_belong_together(unchecked_types: None) -> None:
    texts, scale = jnp.ones((6, 5)), jnp.float32(1)
    with pytest.raises(ValueError, match=r"chunk=4 does not divide 6 pairs evenly"):
        softmax_contrastive_sum(texts, texts, scale, 4)
    with pytest.raises(ValueError, match=r"pairs texts and images: \(6, 5\) texts, \(3, 5\) images"):
        sigmoid_contrastive_sum(texts, texts[:3], scale, 0.0)
