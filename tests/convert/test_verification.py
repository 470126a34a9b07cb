"""`verify`: every kind of difference is found and told where it is, and nothing else is."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_vlm import array_files, checkpoint, cli, convert
from flax_vlm.array_files import ArrayFiles
from flax_vlm.convert import ConversionError, forward, verification
from flax_vlm.convert.stream import Progress
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.convert.verification import Difference, verify
from flax_vlm.layers.param_tree import unflatten_params
from flax_vlm.models.altclip import AltCLIPTextModel, AltCLIPVisionModel, AltRobertaModel
from tests.convert.test_port import write_hf
from tests.tolerances import FLOAT32

TENSOR = "vision_model.encoder.layers.1.mlp.fc1.weight"  # (44, 20), ours is its transpose
PATH = "vision_model/encoder/layers_1/mlp/fc1/kernel"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    write_hf(folder / "hf")
    convert.to_flax(folder / "hf", folder / "native")
    convert.to_torch(folder / "native", folder / "back", max_shard_size="20KB")
    return folder


@pytest.fixture
def folders(pristine: Path, tmp_path: Path) -> Path:
    """The same weights as "hf", "native" and "back"."""
    return shutil.copytree(pristine, tmp_path / "folders")


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of a PyTorch checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rewrite(folder: Path, target: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """A native checkpoint as another one, by Orbax and with its parameters changed."""
    files = checkpoint.open_params(folder)
    params = {path: files.read(path) for path in files.tensors}
    change(params)
    target.mkdir()
    checkpoint.save_params(target, unflatten_params(params))
    checkpoint.write_config(target, checkpoint.read_config(folder))


@pytest.mark.parametrize("block", [verification.BLOCK, 256], ids=["one block", "many blocks"])
def test_equal_whatever_the_kinds(block: int, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BLOCK", block)
    rewrite(folders / "native", folders / "by orbax", lambda params: None)
    names = ("hf", "native", "back", "by orbax")
    sizes = [tensor.nbytes for tensor in load_file(folders / "hf" / "model.safetensors").values()]
    for source, target in [(one, other) for one in names for other in names if one != other]:
        found = verify(folders / source, folders / target)
        assert found.equal, found.report()
        assert (found.parameters, found.nbytes, found.cast) == (len(sizes), sum(sizes), 0)


@pytest.mark.parametrize("block", [verification.BLOCK, 256], ids=["one block", "many blocks"])
def test_values_that_differ_are_told(block: int, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BLOCK", block)
    before = load_file(folders / "hf" / "model.safetensors")[TENSOR]

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[TENSOR][40, 2] += 0.5  # the first in our layout, the last in theirs
        tensors[TENSOR][3, 7] -= 2
        tensors["logit_scale"][...] = 1

    edit(folders / "hf", change)
    after = load_file(folders / "hf" / "model.safetensors")[TENSOR]
    found = verify(folders / "hf", folders / "native")
    assert found.values.keys() == {PATH, "logit_scale"}
    largest = float(abs(np.float64(after[3, 7]) - np.float64(before[3, 7])))
    assert found.values[PATH] == Difference(2, 880, (2, 40), str(after[40, 2]), str(before[40, 2]), largest)
    assert found.values["logit_scale"].index == ()
    assert verify(folders / "native", folders / "hf").values[PATH].source == str(before[40, 2])
    assert f"2 of 880 values, first [2, 40]: {after[40, 2]!s} and {before[40, 2]!s}" in found.report()
    assert "2 differ" in found.report()
    assert not found.equal


def test_every_bit_counts(folders: Path) -> None:
    nan, other_nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)

    def fill(*values: float) -> Callable[[dict[str, np.ndarray]], None]:
        def change(tensors: dict[str, np.ndarray]) -> None:
            tensors["vision_model.pre_layrnorm.bias"][: len(values)] = values

        return change

    edit(folders / "hf", fill(nan, 0.0, np.inf))
    convert.to_flax(folders / "hf", folders / "odd")
    assert verify(folders / "hf", folders / "odd").equal

    edit(folders / "hf", fill(other_nan, -0.0, np.inf))
    difference = verify(folders / "hf", folders / "odd").values["vision_model/pre_layrnorm/bias"]
    assert difference == Difference(2, 20, (0,), "nan (0x7fc00001)", "nan (0x7fc00000)", 0.0)

    edit(folders / "hf", fill(other_nan, 0.0, np.inf))
    found = verify(folders / "hf", folders / "odd")
    assert np.isnan(found.values["vision_model/pre_layrnorm/bias"].largest)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["equal"] is False


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_a_cast_is_made_as_the_conversion_makes_it(dtype: Any, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    edit(tmp_path / "hf", lambda tensors: tensors[TENSOR].__setitem__((0, 0), 1e30))  # overflows in float16
    convert.to_flax(tmp_path / "hf", tmp_path / "native", dtype=dtype)
    found = verify(tmp_path / "hf", tmp_path / "native")
    assert found.equal and found.cast == found.parameters
    assert "after the cast" in found.report()
    back = verify(tmp_path / "native", tmp_path / "hf")  # what was rounded away does not come back
    assert PATH in back.values


@pytest.mark.parametrize("model", [AltCLIPTextModel, AltCLIPVisionModel, AltRobertaModel])
def test_a_tower_is_compared_with_its_part_of_the_whole(model: Any, folders: Path) -> None:
    convert.to_flax(folders / "hf", folders / "tower", model_class=model)
    convert.to_torch(folders / "tower", folders / "tower back")
    for source in ("hf", "native"):
        for target in ("tower", "tower back"):
            found = verify(folders / source, folders / target)
            assert found.equal, found.report()
            assert found.parameters == len(checkpoint.open_params(folders / "tower").tensors)
    with pytest.raises(ConversionError, match=f"expected a AltCLIPModel, or what contains one; a {model.__name__}"):
        verify(folders / "tower", folders / "native")
    edit(folders / "hf", lambda tensors: [each.__imul__(2) for each in tensors.values()])
    assert verify(folders / "hf", folders / "tower").values


def test_parameters_without_a_counterpart(folders: Path) -> None:
    def change(params: dict[str, np.ndarray]) -> None:
        params["text_model/roberta/pooler/dense/bias"] = params["text_model/pre_LN/bias"]
        del params[PATH]
        params["logit_scale"] = params["logit_scale"].astype(np.int32)
        params["text_model/pre_LN/scale"] = params["text_model/pre_LN/scale"][:5]

    rewrite(folders / "native", folders / "other", change)
    found = verify(folders / "hf", folders / "other")
    assert found.only_source == [PATH]
    assert found.only_target == ["text_model/roberta/pooler/dense/bias"]
    assert found.unlike == {"logit_scale": "float32 and int32", "text_model/pre_LN/scale": "shape (24,) and (5,)"}
    assert not found.values and not found.equal
    assert f"only in {folders / 'hf'}: 1\n  {PATH}\n" in found.report()


def test_hashes_hold_a_checkpoint_to_what_was_written(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BLOCK", 256)
    for name in ("native", "back"):
        found = verify(folders / name)
        assert found.equal and found.target == folders / name / "conversion.json"
        assert found.parameters == len(load_file(folders / "hf" / "model.safetensors"))
    chunk = next((folders / "native" / "params" / PATH.replace("/", ".") / "c").rglob("[0-9]"))
    chunk = chunk if chunk.is_file() else next(chunk.rglob("[0-9]"))
    data = bytearray(chunk.read_bytes())
    data[17] ^= 1
    chunk.write_bytes(data)
    assert list(verify(folders / "native").unlike) == [PATH]
    assert "SHA-256" in verify(folders / "native").report()

    file = folders / "back" / "conversion.json"
    recorded = json.loads(file.read_text())
    recorded["parameters"]["elsewhere/kernel"] = recorded["parameters"].pop(PATH)
    file.write_text(json.dumps(recorded))
    found = verify(folders / "back")
    assert (found.only_source, found.only_target) == ([PATH], ["elsewhere/kernel"])
    with pytest.raises(ConversionError, match=r"expected a conversion\.json"):
        verify(folders / "hf")


def test_no_block_is_large_and_each_is_read_once(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (array_files, verification):
        monkeypatch.setattr(module, "BLOCK", 1024)
    monkeypatch.setattr(array_files, "CHUNK", 1024)
    convert.to_flax(folders / "hf", folders / "chunked")
    sizes: dict[type, list[int]] = {ArrayFiles: [], TorchFiles: []}

    def watch(files: type[ArrayFiles] | type[TorchFiles]) -> None:
        read = files.read

        def watched(self: Any, name: str, index: Any = None) -> np.ndarray:
            array = read(self, name, index)
            sizes[files].append(array.nbytes)
            return array

        monkeypatch.setattr(files, "read", watched)

    watch(ArrayFiles)
    watch(TorchFiles)
    seen: list[Progress] = []
    found = verify(folders / "hf", folders / "chunked", progress=seen.append)
    assert found.equal
    for read in sizes.values():
        assert sum(read) == found.nbytes
        assert max(read) <= 1024
    done = [each.done for each in seen]
    assert len(done) == len(sizes[TorchFiles]) > found.parameters
    assert done == sorted(done) and done[-1] == seen[-1].total == found.nbytes
    assert {each.tensor for each in seen} == checkpoint.open_params(folders / "chunked").tensors.keys()


def test_bad_input_is_one_sentence(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "hf" / "model.safetensors").write_bytes(b"nothing")
    assert cli.main(["verify", str(folders / "hf"), str(folders / "native")]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert cli.main(["verify", str(folders / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_command(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, native = str(folders / "hf"), str(folders / "native")
    assert cli.main(["verify", hf, native]) == 0
    assert "all equal, bit for bit" in capsys.readouterr().out
    assert cli.main(["verify", native, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    edit(folders / "hf", lambda tensors: tensors[TENSOR].__imul__(2))
    for mode in ([], ["--quiet"], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify", hf, native, *mode])
        assert ended.value.code == 1
        out = capsys.readouterr().out
        assert PATH in out
    said = json.loads(out)
    assert said["equal"] is False
    assert said["values"][PATH]["index"] == [0, 0] and said["values"][PATH]["count"] == 880


@pytest.mark.torch
def test_forward(folders: Path) -> None:
    assert forward.TOLERANCE == FLOAT32
    for source, target in (("hf", "native"), ("native", "back"), ("hf", "back")):
        found = verify(folders / source, folders / target, forward=True)
        assert found.equal, found.report()
        assert {"logits_per_text", "vision_model_output.pooler_output"} <= found.outputs.keys()
        assert "logits_per_text" in found.report()


@pytest.mark.torch
def test_forward_after_a_cast_and_of_a_tower(folders: Path) -> None:
    convert.to_flax(folders / "hf", folders / "half", dtype="bfloat16", model_class=AltRobertaModel)
    found = verify(folders / "hf", folders / "half", forward=True)
    assert found.equal, found.report()
    assert found.outputs.keys() == {"last_hidden_state"}


@pytest.mark.torch
def test_forward_finds_what_differs(folders: Path) -> None:
    edit(folders / "hf", lambda tensors: tensors["visual_projection.weight"].__imul__(-1))
    found = verify(folders / "hf", folders / "native", forward=True)
    assert found.outputs["logits_per_image"] > 0.1 > FLOAT32 > found.outputs["text_embeds"]
    assert "outputs more than 1e-05 of their RMS apart" in found.report()


def test_forward_says_what_it_needs(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"expected torch and transformers.*pip install flax-vlm\[verify\]"):
        verify(folders / "hf", folders / "native", forward=True)


@pytest.mark.torch
def test_forward_needs_a_pytorch_side(folders: Path) -> None:
    for target in (None, folders / "native"):
        with pytest.raises(ConversionError, match="two checkpoints, of which one is PyTorch's"):
            verify(folders / "native", target, forward=True)
