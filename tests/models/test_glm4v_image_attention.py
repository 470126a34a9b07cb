"""What a word of GLM-4V was read from: shares that can be worked out by hand, in loop and scan."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import GLM4VConfig, GLM4VForConditionalGeneration, GLM4VVisionConfig
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.glm4v import EVA2CLIPModel, image_attention
from flax_vlm.models.glm4v.image_attention import _merged, _of_slots
from flax_vlm.models.glm4v.splice import splice

BEGIN, END = 8, 9
# A word, a picture, a word, another picture, two words; and in slots, of which each picture has four for its patches.
IDS = np.array([[1, BEGIN, 0, END, 2, BEGIN, 0, END, 3, 4]])
SLOTS = [None, None, 0, 0, 0, 0, None, None, None, 1, 1, 1, 1, None, None, None]  # whose patch stands there
LAST = [0, 1, 5, 6, 7, 8, 12, 13, 14, 15]  # the last slot of each id
VISION = GLM4VVisionConfig(
    hidden_size=12, intermediate_size=8, num_hidden_layers=2, num_heads=3, image_size=8, patch_size=2, num_positions=17
)


def make_model(layers: int = 2) -> Any:
    config = GLM4VConfig(
        hidden_size=8,
        num_layers=layers,
        num_attention_heads=2,
        kv_channels=4,
        multi_query_group_num=1,
        ffn_hidden_size=8,
        padded_vocab_size=11,
        seq_length=32,
        eos_token_id=(10,),
        pad_token_id=10,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        vision_config=VISION,
    )
    return GLM4VForConditionalGeneration(config)


def make_params(model: Any, indifferent: bool = False) -> Any:
    """Random parameters; or without queries, so that everything attends all it may alike."""
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())["params"])

    def fill(path: Any, leaf: Any) -> np.ndarray:
        queries = indifferent and "q_proj" in [key.key for key in path]
        return (np.zeros if queries else rng.standard_normal)(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def make_inputs(batch: int = 1) -> dict[str, np.ndarray]:
    images = np.random.default_rng(1).standard_normal((batch, 2, 8, 8, 3)).astype(np.float32)
    return {"input_ids": np.repeat(IDS, batch, 0), "attention_mask": np.ones((batch, 10), int), "images": images}


def test_indifferent_attention_gives_the_shares_that_it_must() -> None:
    model = make_model()
    own, through_text = image_attention(model, make_params(model, indifferent=True), make_inputs())
    assert own.shape == (1, 10, 2, 4, 4)
    # Slot t attends 0 to t alike, and keeps half of what it was.
    patches = np.array([[of == picture for picture in (0, 1)] for of in SLOTS], float)
    attended = np.tril(np.ones((16, 16))) / np.arange(1, 17)[:, None]
    layer = (attended + np.eye(16)) / 2
    for ours, weights in ((own, attended), (through_text, layer @ layer)):
        expected = (weights @ patches)[LAST]
        expected /= np.maximum(expected.sum(-1, keepdims=True), 1e-9)
        np.testing.assert_allclose(ours.sum((-2, -1))[0], expected, atol=1e-6)
    # All patches of a picture count alike where all of its vectors have been seen.
    np.testing.assert_allclose(own[0, -1], np.full((2, 4, 4), 1 / 32), atol=1e-6)


def test_a_vector_has_the_patches_that_it_is_made_of() -> None:
    """A tower whose tokens keep to themselves: a change of a patch is one of the vector that the shares name."""
    model = make_model()
    params = make_params(model)["transformer"]["vision"]
    for name, layer in params["transformer"].items():
        assert name.startswith("layers_")
        layer["attention"]["dense"]["kernel"] *= 0
    tower, images = EVA2CLIPModel(model.config), np.zeros((16, 8, 8, 3), np.float32)
    for patch, image in enumerate(images):
        row, column = divmod(patch, 4)
        image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    apply = jax.jit(tower.apply)
    plain, seen = (np.asarray(apply({"params": params}, each)) for each in (0 * images, images))
    changed = np.abs(seen - plain).max(-1)[:, 1:-1] > 1e-4  # [patches, vectors]
    assert changed.sum() == 16
    np.testing.assert_allclose(_merged(jnp.eye(17)[None], VISION)[0].T, changed / 4, atol=1e-6)


def test_slots_have_what_their_own_vectors_have() -> None:
    """Also in a row that is padded and has one picture of two."""
    ids = np.array([IDS[0], [10, 10, 10, 10, 10, 1, BEGIN, 0, END, 2]])
    slots = splice(jnp.asarray(ids), jnp.asarray(ids != 10), BEGIN, END, images=2, patches=4)
    of_vectors = jnp.arange(1.0, 17)[:, None].reshape(4, 4, 1)  # a number for each: rows, pictures, vectors
    of_slots = np.asarray(_of_slots(slots, of_vectors, batch=2))[..., 0]
    expected = np.zeros((16, 2))
    expected[2:6, 0], expected[9:13, 1] = np.arange(1, 5), np.arange(5, 9)
    np.testing.assert_array_equal(of_slots[0], expected)
    only = np.zeros((16, 2))
    only[10:14, 0] = np.arange(9, 13)
    np.testing.assert_array_equal(of_slots[1], only)


def test_without_the_tower_the_patches_of_a_vector_count_alike() -> None:
    model = make_model()
    params, inputs = make_params(model), make_inputs()
    whole = image_attention(model, params, inputs)
    for ours, alone in zip(whole, image_attention(model, params, inputs, through_tower=False), strict=True):
        np.testing.assert_allclose(alone.sum((-2, -1)), ours.sum((-2, -1)), atol=1e-5)  # the pictures' shares
        blocks = alone.reshape(1, 10, 2, 2, 2, 2, 2)
        np.testing.assert_allclose(blocks, np.broadcast_to(blocks.mean((4, 6), keepdims=True), blocks.shape), atol=1e-6)
        assert np.ptp(alone[0, -1]) > 1e-3  # but not those of a picture
        assert np.abs(alone - ours).max() > 1e-3


def test_loop_and_scan_agree() -> None:
    model = make_model()
    params, inputs = make_params(model), make_inputs(2)
    scanned = image_attention(model.clone(scan_layers=True), stack_params(params), inputs)
    for ours, theirs in zip(image_attention(model, params, inputs), scanned, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(ours.sum((-3, -2, -1)), [[0, 0, *[1] * 8]] * 2, atol=1e-5)


def test_padding_and_answers_change_nothing() -> None:
    model = make_model()
    params, inputs = make_params(model), make_inputs()
    alone = image_attention(model, params, inputs)
    padded = {
        "input_ids": np.pad(IDS, ((0, 0), (3, 0))),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (3, 0))),
    }
    longer = np.concatenate([IDS, [[5, 6]]], axis=1)
    for ours, pad, answered in zip(
        alone,
        image_attention(model, params, inputs | padded),
        image_attention(model, params, inputs, longer),
        strict=True,
    ):
        np.testing.assert_allclose(pad[:, 3:], ours, atol=1e-5)
        assert not pad[:, :3].any()
        np.testing.assert_allclose(answered[:, :10], ours, atol=1e-5)
        np.testing.assert_allclose(answered[:, 10:].sum((-3, -2, -1)), [[1, 1]], atol=1e-5)
    with pytest.raises(ValueError, match=r"expected the prompts \(1, 10\) with their answers behind"):
        image_attention(model, params, inputs, longer[:, ::-1])
    with pytest.raises(ValueError, match="expected ids and images"):
        image_attention(model, params, {"input_ids": IDS})
