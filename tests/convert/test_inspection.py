"""`inspect`: what a checkpoint's headers say, how it is shown, and what differs between two."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_vlm import cli, convert
from flax_vlm.convert import ConversionError
from flax_vlm.convert.inspection import compare, inspect
from flax_vlm.models.altclip import AltCLIPVisionModel
from tests.convert.test_port import write_hf

TENSOR = "vision_model.encoder.layers.1.mlp.fc1.weight"
PATH = "vision_model/encoder/layers_1/mlp/fc1/kernel"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    write_hf(folder / "hf")
    convert.to_flax(folder / "hf", folder / "native")
    convert.to_torch(folder / "native", folder / "back", key_style="v5", max_shard_size="20KB")
    return folder


@pytest.fixture
def folders(pristine: Path, tmp_path: Path) -> Path:
    """The same weights as "hf", "native" and "back"."""
    return shutil.copytree(pristine, tmp_path / "folders")


def state(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Any]) -> Path:
    """A PyTorch checkpoint of these tensors (or shapes) and no config.json."""
    folder.mkdir(exist_ok=True)
    arrays = {name: np.zeros(each, np.float32) if isinstance(each, tuple) else each for name, each in tensors.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def differs(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", *map(str, arguments)])
    assert ended.value.code == 1


def test_what_a_pytorch_checkpoint_holds(folders: Path) -> None:
    tensors = state(folders / "hf")
    found = inspect(folders / "hf")
    assert (found.kind, found.provenance) == ("PyTorch", None)
    assert found.config == json.loads((folders / "hf" / "config.json").read_text())
    assert {name: (info.shape, info.dtype) for name, info in found.tensors.items()} == {
        name: (array.shape, array.dtype) for name, array in tensors.items()
    }
    assert found.tree.size == sum(array.size for array in tensors.values())
    assert found.tree.nbytes == sum(array.nbytes for array in tensors.values())
    assert found.dtypes == {"float32": len(tensors)}
    assert found.files == {"model.safetensors": found.tree.nbytes}
    tower = [array for name, array in tensors.items() if name.startswith("vision_model.encoder.")]
    assert found.modules()["vision_model.encoder"].size == sum(array.size for array in tower)
    assert found.modules(1).keys() == {"text_model", "vision_model", "text_projection", "visual_projection"}
    assert inspect(folders / "hf" / "model.safetensors").tensors == found.tensors


def test_a_converted_checkpoint_knows_where_it_comes_from(folders: Path) -> None:
    hf, native, back = (inspect(folders / name) for name in ("hf", "native", "back"))
    assert native.kind == "native"
    assert native.tensors[PATH].shape == hf.tensors[TENSOR].shape[::-1]
    assert native.tree.nbytes == back.tree.nbytes == hf.tree.nbytes
    assert native.provenance and native.provenance["source"]["files"].keys() == {"model.safetensors"}
    assert native.hashes().keys() == native.tensors.keys()
    assert back.hashes().keys() == back.tensors.keys()
    assert len(back.files) > 3 and sum(back.files.values()) == hf.tree.nbytes


@pytest.mark.parametrize("name", ["hf", "native"])
def test_nothing_slow_is_imported(name: str, folders: Path) -> None:
    slow = "{'jax', 'flax', 'orbax', 'tensorstore', 'torch', 'transformers', 'huggingface_hub'}"
    code = (
        "import sys; from flax_vlm import cli\n"
        f"assert cli.main(['inspect', {str(folders / name)!r}, '--depth', '1']) == 0\n"
        f"print({slow} & set(sys.modules) or 'nothing slow')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("nothing slow"), done.stdout + done.stderr


def test_equal_layers_are_one_line(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, folders / "native")
    assert "text_model" in out and "AltCLIPModel" in out
    assert " layers_{0..2} " in out and "3 alike" in out and "layers_1" not in out
    assert "converted by flax_vlm" in out and "from hf" in out
    out = shown(capsys, folders / "hf")
    assert "─ {0..2} " in out and "─ fc1 " in out and "model.safetensors" in out


def test_a_layer_that_differs_stands_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"blocks.{i}.{part}" for i in range(12) for part in ("fc1", "fc2")]
    folder = write(tmp_path / "hf", dict.fromkeys(names, (3, 5)) | {"blocks.7.fc1": (2,), "head": (4,)})
    rows = [line.split("─ ")[1].split() for line in shown(capsys, folder).splitlines() if "─ " in line]
    leaf = "[3, 5] float32 15 60 bytes".split()
    pair = [["fc1", *leaf], ["fc2", *leaf]]
    assert rows == [
        ["blocks", "347", "1.4", "kB"],
        ["{0..6}", "7", "alike", "210", "840", "bytes"],
        *pair,
        ["7", "17", "68", "bytes"],
        ["fc1", "[2]", "float32", "2", "8", "bytes"],
        ["fc2", *leaf],
        ["{8..11}", "4", "alike", "120", "480", "bytes"],
        *pair,
        ["head", "[4]", "float32", "4", "16", "bytes"],
    ]


def test_depth(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, folders / "native", "--depth", 1)
    assert "─ vision_model " in out and "─ encoder " not in out
    assert "─ " not in shown(capsys, folders / "native", "--depth", 0)
    modules = json.loads(shown(capsys, folders / "native", "--depth", 2, "--json"))["modules"]
    assert "vision_model/encoder" in modules and "vision_model/encoder/layers_0" not in modules
    assert cli.main(["inspect", str(folders / "native"), "--depth", "-1"]) == 2


def test_hashes(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = json.loads((folders / "native" / "conversion.json").read_text())["parameters"]
    for name in ("native", "back"):
        out = shown(capsys, folders / name, "--hashes")
        assert all(each["sha256"] in out for each in recorded.values())
    assert recorded[PATH]["sha256"] not in shown(capsys, folders / "native")
    assert json.loads(shown(capsys, folders / "native", "--json"))["provenance"]["parameters"] == recorded


def test_json(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(shown(capsys, folders / "hf", "--json"))
    assert said["tensors"][TENSOR] == {
        "shape": [44, 20],
        "dtype": "float32",
        "bytes": 3520,
        "file": "model.safetensors",
    }
    assert said["bytes"] == sum(array.nbytes for array in state(folders / "hf").values())
    assert said["modules"]["vision_model"]["bytes"] < said["bytes"]


def test_names_are_no_commands_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "odd", {"[red]a[/red]": (1,), "c." * 300 + "d": (1,)})
    assert "no config.json" in shown(capsys, folder)
    (folder / "config.json").write_text(json.dumps({"\x1b[31m": "\x1b[32m", "[bold]": 1}))
    out = shown(capsys, folder)
    assert "─ [red]a[/red] " in out and "[bold] 1" in out and "\\x1b[31m" in out and "\x1b" not in out


def test_a_name_may_stand_above_another(tmp_path: Path) -> None:
    found = inspect(write(tmp_path / "odd", {"a": (2,), "a.b": (3,)}))
    assert (found.tree.size, found.tree.children["a"].size) == (5, 5)


def test_equal_checkpoints(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folders / "native", folders / "copy")
    assert "99 parameters compared by the hashes" in shown(capsys, folders / "native", "--diff", folders / "copy")
    out = shown(capsys, folders / "hf", "--diff", folders / "hf")
    assert "no difference" in out and "contents not compared" in out
    assert json.loads(shown(capsys, folders / "hf", "--diff", folders / "hf", "--json"))["equal"] is True


def test_what_differs(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = state(folders / "hf")
    tensors["extra.weight"] = tensors.pop("logit_scale")
    tensors[TENSOR] = tensors[TENSOR].astype(np.float16)
    other = write(folders / "other", tensors)
    config = json.loads((folders / "hf" / "config.json").read_text())
    config["text_config"]["hidden_size"] = 25
    config["new"] = None
    (other / "config.json").write_text(json.dumps(config))
    found = compare(inspect(folders / "hf"), inspect(other))
    assert (found.only_a, found.only_b) == (["logit_scale"], ["extra.weight"])
    assert found.changed == {TENSOR: ("float32 (44, 20)", "float16 (44, 20)")}
    assert found.config == {"text_config.hidden_size": {"a": 24, "b": 25}, "new": {"b": None}}
    differs(folders / "hf", "--diff", other)
    out = capsys.readouterr().out
    for line in ("logit_scale", f"{TENSOR}: float32", "text_config.hidden_size: 24 -> 25", "new: absent -> null"):
        assert f"  {line}" in out
    differs(folders / "hf", "--diff", other, "--json")
    assert json.loads(capsys.readouterr().out)["only_b"] == ["extra.weight"]


def test_contents_differ_by_their_hashes(folders: Path) -> None:
    tensors = state(folders / "hf")
    tensors[TENSOR][0, 0] += 1
    save_file(tensors, folders / "hf" / "model.safetensors")
    convert.to_flax(folders / "hf", folders / "trained")
    convert.to_torch(folders / "trained", folders / "trained back")
    for name in ("trained", "trained back"):
        found = compare(inspect(folders / "native"), inspect(folders / name))
        assert (found.contents, found.hashed) == ([PATH], len(tensors))
        assert not (found.only_a or found.only_b or found.changed or found.config)


def test_across_kinds(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for one, other in (("hf", "native"), ("native", "hf"), ("native", "back")):  # "back" has names of another spelling
        found = compare(inspect(folders / one), inspect(folders / other))
        assert found.equal, found.report()
    convert.to_flax(folders / "hf", folders / "tower", model_class=AltCLIPVisionModel, dtype="bfloat16")
    found = compare(inspect(folders / "hf"), inspect(folders / "tower"))
    assert all(not name.startswith("vision_model.") for name in found.only_a) and not found.only_b
    assert found.changed[TENSOR] == ("float32, 880 elements", "bfloat16, 880 elements")

    (folders / "native" / "conversion.json").unlink()
    assert cli.main(["inspect", str(folders / "hf"), "--diff", str(folders / "native")]) == 2
    assert "flax-vlm verify compares the two by value" in capsys.readouterr().err
    assert compare(inspect(folders / "back"), inspect(folders / "native")).equal  # the other side's file says as much


def test_bad_input_is_one_sentence(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "hf" / "config.json").write_text("{half")
    for path in (folders / "nowhere", folders, folders / "hf"):
        assert cli.main(["inspect", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    (folders / "native" / "conversion.json").write_text('{"parameters": []}')
    with pytest.raises(ValueError, match=r"conversion\.json"):
        inspect(folders / "native")
    with pytest.raises(ConversionError, match="expected one of"):
        inspect(folders)
