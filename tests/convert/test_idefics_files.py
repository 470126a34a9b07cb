"""Whole IDEFICS checkpoints through the engine: there and back in every format, parts, and into transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import flax_vlm
from flax_vlm import convert
from flax_vlm.convert import ConversionError
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models.idefics import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsModel,
    IdeficsPerceiverResampler,
    IdeficsVisionModel,
)
from tests.parity import idefics_cases as cases
from tests.tolerances import FLOAT32, assert_close

INPUTS = {
    name: array.astype(np.float32) if array.dtype == np.float64 else array
    for name, array in cases.inputs(padding_side="left").items()
}


def random_state(config: IdeficsConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    state = convert.state_dict(config, cases.random_params(config, "float32"))
    return {name: np.array(tensor, dtype, order="C") for name, tensor in state.items()}


def write_config(folder: Path, config: IdeficsConfig, **changes: Any) -> None:
    folder.mkdir(parents=True)
    data = config.to_hf() | {"architectures": ["IdeficsForVisionText2Text"]} | changes
    (folder / "config.json").write_text(json.dumps(data))


def write_hf(folder: Path, config: IdeficsConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A PyTorch checkpoint in two shards; returns its tensors."""
    state = random_state(config, dtype)
    write_config(folder, config)
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:70], "model-00002-of-00002.safetensors": names[70:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def assert_holds(folder: Path, state: dict[str, np.ndarray]) -> None:
    files = TorchFiles.open(folder)
    assert files.tensors.keys() == state.keys()
    for name, array in state.items():
        held = np.array(files.read(name))
        assert held.dtype == array.dtype and held.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", cases.WHOLE)
def test_there_and_back_is_exact(name: str, dtype: Any, tmp_path: Path) -> None:
    state = write_hf(tmp_path / "hf", cases.WHOLE[name], dtype)
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back", max_shard_size="100KB")
    assert_holds(tmp_path / "back", state)
    assert IdeficsConfig.from_hf(json.loads((tmp_path / "back" / "config.json").read_text())) == cases.WHOLE[name]


@pytest.mark.torch
def test_bin_with_the_buffers_of_2023(tmp_path: Path) -> None:
    import torch

    state = random_state(cases.RESAMPLED)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(2)}
    write_config(tmp_path / "hf", cases.RESAMPLED)
    tensors = {name: torch.tensor(array) for name, array in (state | buffers).items()}
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    assert_holds(tmp_path / "back", state)


def test_a_head_that_repeats_the_embeddings(tmp_path: Path) -> None:
    state = random_state(cases.TIED)
    twins = {
        "lm_head.weight": state["model.embed_tokens.weight"],
        "lm_head.additional_fc.weight": state["model.embed_tokens.additional_embedding.weight"],
    }
    write_config(tmp_path / "hf", cases.TIED)
    save_file(state | {name: array.copy() for name, array in twins.items()}, tmp_path / "hf" / "model.safetensors")
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    assert_holds(tmp_path / "back", state)

    write_config(tmp_path / "trained", cases.TIED)
    save_file(state | {name: array + 1 for name, array in twins.items()}, tmp_path / "trained" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head.*was expected to equal.*Set tie_word_embeddings to false"):
        convert.to_flax(tmp_path / "trained", tmp_path / "refused")


def test_a_config_that_counts_other_layers(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", cases.RESAMPLED)
    write_hf(tmp_path / "fewer", cases.RESAMPLED)
    data = replace(cases.RESAMPLED, num_hidden_layers=4).to_hf()
    (tmp_path / "fewer" / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConversionError, match=r"layers_[23]/"):
        convert.to_flax(tmp_path / "fewer", tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("part", [IdeficsModel, IdeficsVisionModel, IdeficsPerceiverResampler])
def test_parts_out_of_the_whole(part: Any, tmp_path: Path) -> None:
    state = write_hf(tmp_path / "hf", cases.RESAMPLED)
    convert.to_flax(tmp_path / "hf", tmp_path / "whole")
    convert.to_flax(tmp_path / "hf", tmp_path / "part", model_class=part)
    convert.to_torch(tmp_path / "part", tmp_path / "back")
    # The part as written, as written back, and out of a whole of either kind.
    loaded = [flax_vlm.from_pretrained(tmp_path / "part")]
    loaded += [flax_vlm.from_pretrained(tmp_path / name, model_class=part) for name in ("hf", "whole", "back")]
    for each in loaded:
        assert type(each.model) is part
        jax.tree.map(np.testing.assert_array_equal, each.params, loaded[0].params)
    held = convert.state_dict(loaded[0].config, loaded[0].params, part)
    for name, array in held.items():
        whole = next(key for key in state if key.endswith(f".{name}") and state[key].shape == array.shape)
        np.testing.assert_array_equal(array, state[whole])


@pytest.mark.torch
@pytest.mark.parametrize("name", ["resampled", "tied"])
def test_transformers_loads_what_we_export(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    write_hf(tmp_path / "hf", cases.WHOLE[name])
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    load = transformers.IdeficsForVisionText2Text.from_pretrained
    loaded, info = load(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    inputs = INPUTS | {"input_ids": INPUTS["input_ids"] % cases.WHOLE[name].vocab_size}
    expected = loaded.eval()(**cases.to_torch(inputs, "float32")).logits.detach()
    tokens = inputs["attention_mask"] != 0
    vlm = flax_vlm.from_pretrained(tmp_path / "native")
    assert type(vlm.model) is IdeficsForVisionText2Text and vlm.config == cases.WHOLE[name]
    assert_close(vlm(**inputs).logits[tokens], expected[tokens], FLOAT32)


@pytest.mark.torch
def test_we_load_what_transformers_saves(tmp_path: Path) -> None:
    theirs = cases.torch_model(cases.TIED, "float32")
    theirs.save_pretrained(tmp_path / "hf")
    vlm = flax_vlm.from_pretrained(tmp_path / "hf", scan_layers=True)
    tokens = INPUTS["attention_mask"] != 0
    expected = theirs(**cases.to_torch(INPUTS, "float32")).logits.detach()
    assert_close(vlm(**INPUTS).logits[tokens], expected[tokens], FLOAT32)
    vlm.save_pretrained(tmp_path / "saved")
    again = flax_vlm.from_pretrained(tmp_path / "saved", scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, vlm.params)
    assert "blocks" in again.params["model"] and len(flatten_params(again.params)) < len(theirs.state_dict())
