"""`VLM.encode_images`: encoded once, pictures serve every prompt, and say what pixels say."""

from typing import Any

import jax
import numpy as np
import pytest

from flax_vlm.generation import GenerationConfig
from flax_vlm.models.altclip import AltCLIPModel
from flax_vlm.models.glm4v import GLM4VForConditionalGeneration
from flax_vlm.models.glm4v.splice import NO_VECTOR, lay_out, splice
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from flax_vlm.pretrained import VLM
from tests.parity import altclip_cases, idefics_cases
from tests.talkers import GLM4V, tiny_glm4v
from tests.tolerances import assert_close

EXACT = 1e-10  # the same numbers in float64, in programs that differ
BEGIN, END, PATCHES = 410, 411, 16


def idefics(config: Any) -> tuple[Any, dict[str, Any], str]:
    params = jax.tree.map(lambda leaf: leaf * 2, idefics_cases.random_params(config, "float64"))
    model = IdeficsForVisionText2Text(config, dtype=np.float64, param_dtype=np.float64)
    vlm = VLM(model, params, None, GenerationConfig(pad_token_id=config.pad_token_id))
    inputs = dict(idefics_cases.to_jax(idefics_cases.inputs(padding_side="left", config=config), "float64"))
    return vlm, inputs, "perceiver_embeddings" if config.use_resampler else "image_encoder_embeddings"


def glm4v() -> tuple[Any, dict[str, Any], str]:
    """Two rows, of two pictures and of one."""
    tiny: Any = tiny_glm4v()
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny.params)
    model = GLM4VForConditionalGeneration(GLM4V, dtype=np.float64, param_dtype=np.float64)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 256, (2, 14))
    for row, start in ((0, 1), (0, 6), (1, 3)):
        ids[row, start : start + 3] = BEGIN, 400, END
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "images": rng.standard_normal((2, 2, 112, 112, 3)),
    }
    inputs["attention_mask"][1, :2] = 0
    return VLM(model, params, None, tiny.generation_config), inputs, "image_embeds"


def assert_encodings_serve(vlm: Any, inputs: dict[str, Any], name: str) -> None:
    encoded = vlm.encode_images(**inputs)
    pixels = vlm.model.pixel_input
    assert encoded.keys() == {name, pixels} and encoded[pixels] is None
    rows = np.shape(inputs["input_ids"])[0]
    assert encoded[name].shape[:2] == (rows, inputs[pixels].shape[1]) and encoded[name].dtype == np.float64

    def answer(inputs: Any) -> tuple[Any, np.ndarray]:
        return vlm(**inputs).logits, vlm.generate(**inputs, max_new_tokens=6).sequences

    logits, ids = answer(inputs | encoded)
    expected_logits, expected_ids = answer(inputs)
    assert_close(logits, expected_logits, EXACT)
    np.testing.assert_array_equal(ids, expected_ids)
    assert np.abs(vlm(**inputs | {pixels: -inputs[pixels]}).logits - logits).max() > 1e-3, "pictures should count"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("config", ["resampled", pytest.param("plain", marks=pytest.mark.slow)])
def test_idefics(config: str) -> None:
    assert_encodings_serve(*idefics(idefics_cases.WHOLE[config]))


@pytest.mark.usefixtures("x64")
def test_glm4v() -> None:
    vlm, inputs, name = glm4v()
    assert_encodings_serve(vlm, inputs, name)
    with pytest.raises(ValueError, match="at most one of images and image_embeds"):
        vlm(**inputs, **{name: vlm.encode_images(**inputs)[name]})
    with pytest.raises(ValueError, match="image_slots say where image_embeds stand"):
        vlm(input_ids=inputs["input_ids"], image_slots=inputs["input_ids"])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_altclip() -> None:
    model = AltCLIPModel(altclip_cases.WHOLE, dtype=np.float64, param_dtype=np.float64)
    vlm: Any = VLM(model, model.init(jax.random.key(0), **model.example_inputs())["params"])
    pixels = {"pixel_values": altclip_cases.images().astype(np.float64)}
    encoded = vlm.encode_images(**pixels)
    for seed in range(2):  # any texts
        texts = altclip_cases.texts(seed=seed)
        out, expected = vlm(**texts, **encoded), vlm(**texts, **pixels)
        assert_close(out.logits_per_image, expected.logits_per_image, EXACT)
        assert_close(out.image_embeds, expected.image_embeds, EXACT)
        assert out.vision_model_output is None and expected.vision_model_output is not None
    with pytest.raises(ValueError, match="pixel_values or image_features, one of them"):
        vlm(**texts, **pixels, image_features=encoded["image_features"])


def test_what_cannot_be_encoded() -> None:
    vlm, inputs, _ = glm4v()
    del inputs["images"]
    with pytest.raises(ValueError, match=r"no images to encode among .*: expected images"):
        vlm.encode_images(**inputs)
    tower = VLM(object(), {})
    with pytest.raises(ValueError, match="object takes no pictures"):
        tower.encode_images(pixel_values=np.zeros(1))


def test_the_host_lays_out_what_the_model_splices() -> None:
    ids = np.array([[7, BEGIN, 400, END, BEGIN, 400, END, 8, 9]])
    mask = np.ones_like(ids)
    laid = lay_out(ids, mask, BEGIN, END, PATCHES)
    slots = splice(jax.numpy.asarray(ids), jax.numpy.asarray(mask != 0), BEGIN, END, 2, PATCHES)
    np.testing.assert_array_equal(laid["image_slots"], np.where(slots.is_picture, slots.vector, NO_VECTOR))
    np.testing.assert_array_equal(laid["input_ids"], slots.spread(jax.numpy.asarray(ids)))
    np.testing.assert_array_equal(laid["position_ids"], slots.spread(jax.numpy.arange(9)[None]))
    assert laid["attention_mask"].all() and laid["input_ids"].shape == (1, 9 + 2 * (PATCHES - 1))
