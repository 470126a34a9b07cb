"""Whole checkpoints through the engine: formats, dtypes, faults, and that a target appears whole or not at all."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

import flax_vlm
from flax_vlm import checkpoint, convert
from flax_vlm.convert import ConversionError
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPModel, AltCLIPTextModel, AltCLIPVisionModel, AltRobertaModel
from tests.parity import altclip_cases as cases


def random_params(model: nn.Module, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    flat = flatten_params(nn.meta.unbox(abstract_params(model)))
    return unflatten_params({path: rng.standard_normal(leaf.shape).astype(dtype) for path, leaf in flat.items()})


def write_hf(folder: Path, dtype: Any = np.float32, **config: Any) -> dict[str, np.ndarray]:
    """A PyTorch checkpoint of the tiny AltCLIP; returns its tensors."""
    folder.mkdir(parents=True)
    state = convert.state_dict(cases.WHOLE, random_params(AltCLIPModel(cases.WHOLE), dtype))
    state = {name: np.array(tensor, order="C") for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")
    data = cases.WHOLE.to_hf() | {"architectures": ["AltCLIPModel"]} | config
    (folder / "config.json").write_text(json.dumps(data))
    return state


def tensors(folder: Path) -> dict[str, np.ndarray]:
    files = TorchFiles.open(folder)
    return {name: np.array(files.read(name)) for name in files.tensors}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_there_and_back_is_exact(dtype: Any, tmp_path: Path) -> None:
    state = write_hf(tmp_path / "hf", dtype)
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), state)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == np.dtype(dtype).name
    assert config["architectures"] == ["AltCLIPModel"]


def test_cast_on_the_way(tmp_path: Path) -> None:
    state = write_hf(tmp_path / "hf")
    convert.to_flax(tmp_path / "hf", tmp_path / "native", dtype="bfloat16")
    assert {leaf.dtype for leaf in checkpoint.open_params(tmp_path / "native").tensors.values()} == {
        jnp.dtype("bfloat16")
    }
    assert checkpoint.read_config(tmp_path / "native")["torch_dtype"] == "bfloat16"
    convert.to_torch(tmp_path / "native", tmp_path / "back", dtype=np.float32)
    rounded = {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in state.items()}
    assert_same(tensors(tmp_path / "back"), rounded)


def test_shards(tmp_path: Path) -> None:
    state = write_hf(tmp_path / "hf")
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back", max_shard_size="20KB")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    assert_same(tensors(tmp_path / "back"), state)
    convert.to_flax(tmp_path / "back", tmp_path / "again")
    convert.to_torch(tmp_path / "again", tmp_path / "once more")
    assert_same(tensors(tmp_path / "once more"), state)


@pytest.mark.torch
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_bin_files(sharded: bool, tmp_path: Path) -> None:
    import torch

    state = write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    weights = {name: torch.tensor(array) for name, array in state.items()}
    names = list(weights)
    parts = {"pytorch_model.bin": names}
    if sharded:
        parts = {"pytorch_model-00001-of-00002.bin": names[:50], "pytorch_model-00002-of-00002.bin": names[50:]}
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, tmp_path / "hf" / file)
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), state)


def test_state_dict_of_any_tree_of_that_shape() -> None:
    params = random_params(AltCLIPModel(cases.WHOLE))
    state = convert.state_dict(cases.WHOLE, params)
    assert_same(convert.state_dict(cases.WHOLE, stack_params(params)), state)  # a scanned model's gradients, say
    back = convert.from_state_dict(cases.WHOLE, state)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ConversionError, match="elsewhere/kernel"):
        convert.state_dict(cases.WHOLE, {"elsewhere": {"kernel": np.zeros(3)}})
    del state["logit_scale"]
    with pytest.raises(ConversionError, match="logit_scale"):
        convert.from_state_dict(cases.WHOLE, state)


@pytest.mark.parametrize("model", [AltCLIPTextModel, AltCLIPVisionModel, AltRobertaModel])
def test_a_tower_out_of_the_whole(model: Any, tmp_path: Path) -> None:
    state = write_hf(tmp_path / "hf")
    convert.to_flax(tmp_path / "hf", tmp_path / "whole")
    convert.to_flax(tmp_path / "hf", tmp_path / "tower", model_class=model)
    expected = flax_vlm.from_pretrained(tmp_path / "tower").params
    for source in ("hf", "whole"):
        loaded = flax_vlm.from_pretrained(tmp_path / source, model_class=model)
        assert type(loaded.model) is model
        jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    convert.to_torch(tmp_path / "tower", tmp_path / "back")
    for name, array in tensors(tmp_path / "back").items():
        whole = next(key for key in state if key.endswith(name) and state[key].shape == array.shape)
        np.testing.assert_array_equal(array, state[whole])


def test_faults_leave_nothing_behind(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", projection_dim=12)
    with pytest.raises(ConversionError, match=r"\(11, 14\); \(12, 14\) was expected"):
        convert.to_flax(tmp_path / "hf", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_taken_target_stays(tmp_path: Path) -> None:
    state = write_hf(tmp_path / "hf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            convert.to_flax(tmp_path / "hf", tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"

    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_flax(tmp_path / "hf", tmp_path / "native", dtype="bfloat16", overwrite=True)
    assert checkpoint.read_config(tmp_path / "native")["torch_dtype"] == "bfloat16"
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "mine", "native"}
    assert_same(tensors(tmp_path / "hf"), state)


def test_the_processor_travels(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    for name in ("tokenizer.json", "preprocessor_config.json", "README.md"):
        (tmp_path / "hf" / name).write_text(name)
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    for folder in ("native", "back"):
        assert (tmp_path / folder / "tokenizer.json").read_text() == "tokenizer.json"
        assert (tmp_path / folder / "preprocessor_config.json").read_text() == "preprocessor_config.json"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"projection_dim": "many"}, "AltCLIPConfig.projection_dim is 'many': expected int"),
        ({"projection_dim": -1}, "expected a number above 0"),
        ({"text_config": [1]}, "text_config is [1]: expected an object"),
        ({"vision_config": {"hidden_act": "softsign"}}, "unknown activation 'softsign'"),
        ({"text_config": {"position_embedding_type": "rotary"}}, "position_embedding_type 'rotary'"),
        ({"text_config": {"add_cross_attention": True}}, "needs is_decoder=True"),
        ({"text_config": {"hidden_size": 1023}}, "hidden_size 1023 is not a multiple of num_attention_heads 16"),
        ({"text_config": {"pruned_heads": {"99": [0]}}}, "pruned_heads names layer 99"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", **change)
    with pytest.raises(ValueError) as caught:
        convert.to_flax(tmp_path / "hf", tmp_path / "native")
    assert message in str(caught.value)
    assert not (tmp_path / "native").exists()


@pytest.mark.torch
@pytest.mark.parametrize(
    "name, key_style",
    [
        ("AltCLIPModel", "v4"),
        ("AltCLIPModel", "v5"),
        ("AltCLIPVisionModel", "v4"),
        ("AltCLIPVisionModel", "v5"),
        ("AltCLIPTextModel", "v5"),  # transformers 5.23 reads the names of 4.x in the whole model only
    ],
)
def test_transformers_loads_what_we_export(name: str, key_style: Any, tmp_path: Path, caplog: Any) -> None:
    import transformers

    write_hf(tmp_path / "hf")
    model_class = getattr(flax_vlm, name)
    convert.to_flax(tmp_path / "hf", tmp_path / "native", model_class=model_class)
    convert.to_torch(tmp_path / "native", tmp_path / "back", key_style=key_style)
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    ours = flax_vlm.from_pretrained(tmp_path / "native")
    inputs = cases.texts() if name != "AltCLIPVisionModel" else {}
    inputs |= {"pixel_values": cases.images().astype(np.float32)} if name != "AltCLIPTextModel" else {}
    field = "logits_per_text" if name == "AltCLIPModel" else "pooler_output"
    expected = getattr(loaded.eval()(**cases.to_torch(inputs, "float32")), field).detach().numpy()
    np.testing.assert_allclose(getattr(ours(**inputs), field), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
