"""The AltCLIP processor against transformers' own, from the same folder, and without jax or torch in sight."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flax_vlm.processing import AltCLIPProcessor, ImageProcessor, Tokenizer

PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8))
    for i, (h, w) in enumerate([(60, 90), (33, 20), (18, 18)])
]
PREPROCESSOR = {"size": 18, "crop_size": 18, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor"}


@pytest.fixture
def folder(xlm_roberta_dir):
    (xlm_roberta_dir / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (xlm_roberta_dir / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 512, "tokenizer_class": "XLMRobertaTokenizer"})
    )
    return xlm_roberta_dir


def reference(folder):
    transformers = pytest.importorskip("transformers")
    images = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AltCLIPProcessor(images.CLIPImageProcessorPil.from_pretrained(folder), tokenizer)


def assert_equal(ours, theirs):
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["attention_mask"], theirs["attention_mask"])
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"].transpose(0, 2, 3, 1))


@pytest.mark.torch
@pytest.mark.parametrize("saved_by", ["nobody", "us", "transformers"])
def test_equals_transformers(folder, tmp_path, hard_texts, saved_by):
    theirs, ours = reference(folder), AltCLIPProcessor.from_dir(folder)
    if saved_by == "us":
        ours.save(tmp_path / "saved")
        theirs = reference(tmp_path / "saved")
    if saved_by == "transformers":
        theirs.save_pretrained(tmp_path / "saved")
        ours = AltCLIPProcessor.from_dir(tmp_path / "saved")
    texts = [*hard_texts, "two cats " * 400]
    expected = theirs(text=texts, images=PICTURES, padding=True, truncation=True, return_tensors="np")
    out = ours(texts, PICTURES)
    assert_equal(out, expected)
    assert out["input_ids"].shape[1] == 512 and out["input_ids"][-1, -1] == ours.tokenizer.eos_token_id
    assert out["pixel_values"].shape == (3, 18, 18, 3) and out["pixel_values"].dtype == np.float32


@pytest.mark.torch
def test_transformers_loads_a_saved_folder_by_itself(folder, tmp_path):
    ours = AltCLIPProcessor.from_dir(folder)
    ours.save(tmp_path / "saved")
    loaded = pytest.importorskip("transformers").AltCLIPProcessor.from_pretrained(tmp_path / "saved", use_fast=False)
    expected = loaded(text=["two cats", "a"], images=PICTURES, padding=True, return_tensors="np")
    assert_equal(ours(["two cats", "a"], PICTURES), expected)


def test_one_or_many_and_each_alone(folder):
    processor = AltCLIPProcessor.from_dir(folder)
    assert set(processor(text="two cats")) == {"input_ids", "attention_mask"}
    assert processor(images=PICTURES[0])["pixel_values"].shape == (1, 18, 18, 3)
    both = processor(["two cats", "one dog and a bird"], PICTURES, pad_to_multiple_of=32)
    assert both["input_ids"].shape == (2, 32)
    assert processor("two cats", padding="max_length")["input_ids"].shape == (1, 512)


@pytest.mark.parametrize(
    ("model_max_length", "config", "expected"),
    [
        (int(1e30), {}, 512),
        (77, {}, 77),
        (512, {"text_config": {"max_position_embeddings": 40, "pad_token_id": 1}}, 38),
        (int(1e30), {"text_config": {"max_position_embeddings": 514}}, 512),
    ],
)
def test_the_text_limit_is_the_models(folder, model_max_length, config, expected):
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": model_max_length}))
    (folder / "config.json").write_text(json.dumps(config))
    processor = AltCLIPProcessor.from_dir(folder)
    ids = processor("cats " * 600)["input_ids"]
    assert ids.shape == (1, expected) and ids[0, -1] == 2
    with pytest.raises(ValueError, match=f"at most {expected} tokens"):
        processor("cats " * 600, truncation=False)
    with pytest.raises(ValueError, match=f"at most {expected} tokens"):
        processor("cats " * 600, max_length=550)
    processor.save(folder / "saved")
    assert AltCLIPProcessor.from_dir(folder / "saved").max_text_length == expected


def test_refusals_say_what_to_do(folder, tmp_path):
    processor = AltCLIPProcessor.from_dir(folder)
    with pytest.raises(ValueError, match="got neither"):
        processor()
    with pytest.raises(TypeError, match="text: expected a str"):
        processor(PICTURES[0], "two cats")
    with pytest.raises(ValueError, match="one str or more"):
        processor([], PICTURES)
    with pytest.raises(ValueError, match="images: expected one picture"):
        processor("two cats", [])
    with pytest.raises(TypeError, match="got int"):
        processor(images=[3])
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        AltCLIPProcessor.from_dir(tmp_path / "empty")


def test_a_tower_has_its_half(folder, tmp_path):
    (folder / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    texts, pictures = AltCLIPProcessor.from_dir(folder), AltCLIPProcessor.from_dir(tmp_path)
    assert texts("two cats").keys() == {"input_ids", "attention_mask"}
    assert pictures(images=PICTURES).keys() == {"pixel_values"}
    with pytest.raises(ValueError, match=r"images: this checkpoint brings no image processor"):
        texts(images=PICTURES)
    with pytest.raises(ValueError, match=r"text: this checkpoint brings no tokenizer"):
        pictures("two cats")
    for half in (texts, pictures):
        half.save(tmp_path / "half")
    assert AltCLIPProcessor.from_dir(tmp_path / "half")("two cats", PICTURES).keys() == {
        "input_ids",
        "attention_mask",
        "pixel_values",
    }


def test_nested_image_processor_config_is_found(folder):
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 20, "crop_size": 16}}))
    assert AltCLIPProcessor.from_dir(folder).image_processor == ImageProcessor(size=20, crop_size=16)
    assert isinstance(AltCLIPProcessor.from_dir(folder).tokenizer, Tokenizer)


def test_needs_neither_jax_nor_torch():
    heavy = "{'jax', 'flax', 'torch', 'transformers', 'sentencepiece', 'google.protobuf'}"
    code = f"import sys, flax_vlm.processing; sys.exit(str(found) if (found := {heavy} & set(sys.modules)) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
