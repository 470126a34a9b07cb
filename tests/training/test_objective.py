"""What is minimised: in chunks and parts as at once, packed as alone, sharded as on one device."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.models.altclip import AltCLIPModel
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from flax_vlm.training.objective import Objective, contrastive, has_dropout, next_token
from tests.parity import altclip_cases, glm4v_cases, idefics_cases
from tests.tolerances import FLOAT64, FLOAT64_GRADIENT, assert_close

ROOT = Path(__file__).parent.parent.parent
IDEFICS = replace(idefics_cases.RESAMPLED, num_hidden_layers=1)
TIED = replace(IDEFICS, tie_word_embeddings=True)
TEXT = replace(altclip_cases.TEXT, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ALTCLIP = replace(
    altclip_cases.WHOLE, text_config=TEXT, vision_config=replace(altclip_cases.VISION, num_hidden_layers=1)
)
DROPPING = replace(ALTCLIP, text_config=replace(TEXT, hidden_dropout_prob=0.3))
DOUBLE: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def idefics(config: Any = IDEFICS) -> tuple[Any, Any]:
    return IdeficsForVisionText2Text(config, **DOUBLE), idefics_cases.random_params(config, "float64")


@cache
def altclip(config: Any = ALTCLIP) -> tuple[Any, Any]:
    model = AltCLIPModel(config, **DOUBLE)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), **model.example_inputs()))["params"]
    return model, jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, params)


def pairs() -> dict[str, Any]:
    return altclip_cases.to_jax(altclip_cases.texts(rows=6) | {"pixel_values": altclip_cases.images(6)}, "float64")


def with_gradients(objective: Objective) -> Any:
    """(params, batch) to ((mean, weight), gradients of the mean)."""

    def mean(params: Any, batch: Any) -> Any:
        loss = objective(params, batch, jax.random.key(0))
        return loss.total / loss.weight, loss.weight

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def assert_equal(actual: Any, expected: Any) -> None:
    ((value, weight), gradients), ((expected_value, expected_weight), expected_gradients) = actual, expected
    assert weight == expected_weight
    assert_close(value, expected_value, FLOAT64, "loss")
    leaves = jax.tree.leaves(expected_gradients)
    floor = 1e-4 * np.sqrt(np.mean([np.mean(np.square(leaf)) for leaf in leaves]))
    for one, other in zip(jax.tree.leaves(gradients), leaves, strict=True):
        assert_close(one, other, FLOAT64_GRADIENT, floor=float(floor))


def of_language(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, parameters and a batch with labels."""
    if name == "glm4v":
        batch = dict(glm4v_cases.inputs("img"))
        return glm4v_cases.model(), glm4v_cases.params("float64"), batch | {"labels": batch["input_ids"]}
    model, params = idefics({"decoupled": IDEFICS, "tied": TIED}[name])
    batch = idefics_cases.texts() | idefics_cases.embedded_images(model.config)
    batch |= {"labels": idefics_cases.labels(batch)}
    return model, params, idefics_cases.to_jax(batch, "float64")


@pytest.mark.parametrize("name", ["decoupled", "tied", "glm4v"])
def test_next_token_in_chunks_of_words(name: str, x64: None) -> None:
    model, params, batch = of_language(name)
    whole, in_chunks = (with_gradients(next_token(model, chunk))(params, batch) for chunk in (0, 20))
    assert_equal(in_chunks, whole)
    output = jax.eval_shape(lambda p: model.apply({"params": p}, **batch, vocab_chunk=20), params)
    assert output.logits is None
    with pytest.raises(ValueError, match="vocab_chunk came without labels"):
        jax.eval_shape(lambda p: model.apply({"params": p}, batch["input_ids"], vocab_chunk=20), params)


def test_a_packed_row_of_idefics_is_its_documents(x64: None) -> None:
    """Two documents, of two images and one, and padding between and behind them."""
    model, params = idefics()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1, 3, 6, IDEFICS.vision_config.embed_dim))
    ids = rng.integers(3, IDEFICS.vocab_size + IDEFICS.additional_vocab_size, (1, 13))
    sees = np.zeros((1, 13, 3), int)
    sees[0, 1:3, 0] = sees[0, 3:5, 1] = sees[0, 8:11, 2] = 1
    segments = np.array([[1] * 5 + [0] * 2 + [2] * 4 + [0] * 2])
    packed = {
        "input_ids": ids,
        "labels": ids,
        "segment_ids": segments,
        "perceiver_embeddings": images,
        "image_attention_mask": sees,
    }
    together = idefics_cases.forward(model, params, idefics_cases.to_jax(packed, "float64"))
    alone = []
    for place, own in ((slice(0, 5), [0, 1]), (slice(7, 11), [2])):
        document = {
            "input_ids": ids[:, place],
            "labels": ids[:, place],
            "perceiver_embeddings": images[:, own],
            "image_attention_mask": sees[:, place][..., own],
        }
        alone.append(idefics_cases.forward(model, params, idefics_cases.to_jax(document, "float64")))
        assert_close(together.logits[:, place], alone[-1].logits, FLOAT64, f"tokens {place}")
    assert together.loss_weight == 7
    assert_close(together.loss, (4 * alone[0].loss + 3 * alone[1].loss) / 7, FLOAT64, "loss")


def test_a_packed_row_of_glm4v_is_its_documents(x64: None) -> None:
    """Two documents with a picture each, padding behind them, and in front the room of a third picture."""
    model, params = glm4v_cases.model(), glm4v_cases.params("float64")
    images = np.random.default_rng(0).standard_normal((1, 3, 112, 112, 3))
    documents = [[12, 310, 300, 311, 40, 41], [310, 300, 311, 70, 33, 16, 25]]
    ids = np.array([[*documents[0], *documents[1], 300, 300]])
    segments = np.array([[1] * 6 + [2] * 7 + [0] * 2])
    packed = {"input_ids": ids, "labels": ids, "segment_ids": segments, "images": images}
    together = glm4v_cases.forward(model, params, {name: jnp.asarray(each) for name, each in packed.items()})
    more = 15  # slots of a picture, than ids
    assert together.logits.shape[1] == ids.shape[1] + 3 * more
    start, total = more, 0.0
    for number, document in enumerate(documents):
        row = jnp.asarray([document])
        inputs = {"input_ids": row, "labels": row, "images": jnp.asarray(images[:, number : number + 1])}
        alone = glm4v_cases.forward(model, params, inputs)
        end = start + alone.logits.shape[1]
        assert_close(together.logits[:, start:end], alone.logits, FLOAT64, f"document {number}")
        total, start = total + float(alone.loss * alone.loss_weight), end
    assert together.loss_weight == 4 + 5
    assert_close(together.loss, total / 9, FLOAT64, "loss")


def test_contrastive_is_the_models_own_loss(x64: None) -> None:
    model, params = altclip()
    batch = pairs()

    def own(params: Any, batch: Any) -> Any:
        return model.apply({"params": params}, **batch, return_loss=True).loss, jnp.float64(6)

    expected = jax.jit(jax.value_and_grad(own, has_aux=True))(params, batch)
    for options in ({}, {"microbatches": 3, "chunk": 2}):
        assert_equal(with_gradients(contrastive(model, **options))(params, batch), expected)


def test_sigmoid_is_that_of_all_pairs(x64: None) -> None:
    model, params = altclip()
    output = altclip_cases.forward(model, params, pairs())
    logits = np.asarray(output.logits_per_text) - 10
    signs = 2 * np.eye(6) - 1
    expected = np.log1p(np.exp(-signs * logits)).sum() / 6
    (value, weight), _ = with_gradients(contrastive(model, "sigmoid", microbatches=2, chunk=3))(params, pairs())
    assert weight == 6
    assert_close(value, expected, FLOAT64, "loss")


def test_dropout_is_on_where_the_config_has_any(x64: None) -> None:
    _, params = altclip()
    batch = pairs()
    loss = jax.jit(lambda rng: contrastive(AltCLIPModel(DROPPING, **DOUBLE), microbatches=2)(params, batch, rng).total)
    one, same, other = (loss(jax.random.key(seed)) for seed in (1, 1, 2))
    assert one == same and abs(one - other) > 1e-6
    assert has_dropout(DROPPING) and has_dropout(altclip_cases.WHOLE)
    assert not any(map(has_dropout, (ALTCLIP, IDEFICS, glm4v_cases.config())))


def test_what_does_not_belong_together() -> None:
    model = AltCLIPModel(ALTCLIP)
    with pytest.raises(ValueError, match="unknown contrastive loss 'hinge': expected 'softmax' or 'sigmoid'"):
        contrastive(model, "hinge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"input_ids has 6 rows: expected a multiple of the 4 microbatches"):
        contrastive(model, microbatches=4)({}, {"input_ids": jnp.zeros((6, 5), int)}, jax.random.key(0))


@pytest.mark.slow
def test_sharded_objectives_equal_one_device() -> None:
    script = ROOT / "tests" / "training" / "objective_on_eight_devices.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "objectives agree" in done.stdout
