"""The front door."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_vlm
from flax_vlm import checkpoint, convert
from flax_vlm.whole_folder import whole_folder
from tests.convert.test_port import write_hf
from tests.parity import altclip_cases as cases
from tests.tolerances import FLOAT32_REORDERED, assert_close

EXAMPLES = Path(__file__).parent.parent / "examples"
INPUTS = cases.texts() | {"pixel_values": cases.images().astype(np.float32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in PyTorch's layout and in ours."""
    base = tmp_path_factory.mktemp("checkpoints")
    write_hf(base / "hf")
    convert.to_flax(base / "hf", base / "native")
    return {"hf": base / "hf", "native": base / "native"}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_every_way_in_gives_one_model(layout: str, scan_layers: bool, folders: dict[str, Path]) -> None:
    reference = flax_vlm.from_pretrained(folders["hf"])
    vlm = flax_vlm.from_pretrained(folders[layout], scan_layers=scan_layers, attention_implementation="xla")
    assert vlm.config == cases.WHOLE
    assert vlm.processor is None
    assert_close(vlm(**INPUTS).logits_per_text, reference(**INPUTS).logits_per_text, FLOAT32_REORDERED)


def test_jit_changes_nothing(folders: dict[str, Path]) -> None:
    vlm = flax_vlm.from_pretrained(folders["native"])
    jitted = vlm(**INPUTS, return_loss=True)
    plain = vlm.model.apply({"params": vlm.params}, **{k: jnp.asarray(v) for k, v in INPUTS.items()}, return_loss=True)
    assert_close(jitted.loss, plain.loss, FLOAT32_REORDERED)
    assert_close(jitted.logits_per_image, plain.logits_per_image, FLOAT32_REORDERED)


def test_a_shape_compiles_once_and_says_so(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    vlm = flax_vlm.from_pretrained(folders["native"])
    with caplog.at_level(logging.INFO, "flax_vlm"):
        for _ in range(2):
            vlm.get_text_features(**cases.texts())
        vlm.get_text_features(**cases.texts(length=12))
    said = [record.getMessage() for record in caplog.records if record.name == "flax_vlm"]
    assert len(said) == 2
    assert "get_text_features" in said[0] and "input_ids (3, 9)" in said[0]


def test_dtype(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        vlm = flax_vlm.from_pretrained(folder, dtype="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(vlm.params)} == {jnp.dtype("bfloat16")}
        assert vlm(**INPUTS).text_model_output.last_hidden_state.dtype == jnp.bfloat16


def test_float64_needs_jax_to_have_it(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", np.float64)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        flax_vlm.from_pretrained(tmp_path / "hf")
    with jax.enable_x64(True):
        assert (
            flax_vlm.from_pretrained(tmp_path / "hf")(**INPUTS).text_model_output.last_hidden_state.dtype == jnp.float64
        )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_save_and_load(scan_layers: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    vlm = flax_vlm.from_pretrained(folders["hf"], scan_layers=scan_layers)
    vlm.save_pretrained(tmp_path / "saved")
    again = flax_vlm.from_pretrained(tmp_path / "saved", scan_layers=scan_layers)
    jax.tree.map(np.testing.assert_array_equal, again.params, vlm.params)
    with pytest.raises(FileExistsError):
        vlm.save_pretrained(tmp_path / "saved")


def test_pruned_model_saves_and_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    pruned = flax_vlm.from_pretrained(folders["hf"]).prune_heads({1: [0, 3]})
    pruned.save_pretrained(tmp_path / "pruned")
    again = flax_vlm.from_pretrained(tmp_path / "pruned")
    assert again.config.text_config.pruned_heads == ((1, (0, 3)),)
    assert_close(again(**INPUTS).logits_per_text, pruned(**INPUTS).logits_per_text, 0.0)
    with pytest.raises(ValueError, match="cannot be scanned"):
        flax_vlm.from_pretrained(tmp_path / "pruned", scan_layers=True)


def test_dropout_needs_a_key(folders: dict[str, Path]) -> None:
    vlm = flax_vlm.from_pretrained(folders["native"])
    one, two = (vlm(**INPUTS, deterministic=False, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert np.abs(one.logits_per_text - two.logits_per_text).max() > 0.01
    with pytest.raises(Exception, match="dropout"):
        vlm(**INPUTS, deterministic=False)


def test_wrong_inputs_speak(folders: dict[str, Path]) -> None:
    vlm = flax_vlm.from_pretrained(folders["native"])
    with pytest.raises(ValueError, match=r"channels-first.*transpose\(0, 2, 3, 1\)"):
        vlm.get_image_features(pixel_values=np.zeros((2, 3, 30, 30), np.float32))
    with pytest.raises(ValueError, match=r"doesn't match model.*interpolate_pos_encoding=True"):
        vlm.get_image_features(pixel_values=np.zeros((2, 37, 30, 3), np.float32))
    with pytest.raises(ValueError, match="39 tokens: the model has positions for 38"):
        vlm.get_text_features(**cases.texts(length=39))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        vlm.get_text_features()
    with pytest.raises(ValueError, match="pairs each text with an image: 3 texts came with 2 images"):
        vlm(**INPUTS | {"pixel_values": INPUTS["pixel_values"][:2]}, return_loss=True)
    with pytest.raises(ValueError, match="pixel_values"):
        vlm(**cases.texts())


def test_wrong_places_speak(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
        flax_vlm.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        flax_vlm.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{half")
    with pytest.raises(ValueError, match="expected JSON"):
        flax_vlm.from_pretrained(tmp_path / "empty")


def test_a_native_checkpoint_with_another_config_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with whole_folder(tmp_path / "mixed") as draft:
        checkpoint.save_params(draft.folder, flax_vlm.from_pretrained(folders["native"]).params)
        data = checkpoint.read_config(folders["native"])
        checkpoint.write_config(draft.folder, data | {"projection_dim": 12})
    with pytest.raises(ValueError, match=r"text_projection/kernel: has shape \(14, 11\); \(14, 12\) was expected"):
        flax_vlm.from_pretrained(tmp_path / "mixed")


def test_options_of_generation_are_kept(tmp_path: Path) -> None:
    vlm = flax_vlm.from_pretrained(EXAMPLES / "idefics-digits" / "checkpoint")
    assert vlm.generation_config == flax_vlm.GenerationConfig(eos_token_id=2, pad_token_id=0)
    options = {
        "do_sample": True,
        "top_p": 0.9,
        "bad_words_ids": [[589], [590]],
        "eos_token_id": [2, 7],
        "pad_token_id": 0,
    }
    vlm.generation_config = flax_vlm.GenerationConfig(**options, seed=3)
    vlm.save_pretrained(tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "torch")
    for folder in ("native", "torch"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text()) == options
        assert flax_vlm.from_pretrained(tmp_path / folder).generation_config == flax_vlm.GenerationConfig(**options)
