"""Files that are damaged, hostile or no files at all: each is named by one error, before anything is converted."""

import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_vlm import checkpoint
from flax_vlm.convert.errors import ConversionError
from flax_vlm.convert.torch_files import MAX_JSON, TorchFiles

from .test_torch_files import STATE, write, write_bin


def refused(path: Path) -> str:
    with pytest.raises(ConversionError) as raised:
        TorchFiles.open(path)
    return str(raised.value)


# ------------------------------------------------------------------------------------------------- what is no file


def test_a_folder_without_weights(tmp_path: Path):
    assert "came an empty folder" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors" in refused(tmp_path)
    assert "came config.json" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "nowhere")
    (tmp_path / "weights.msgpack").write_bytes(b"x")
    assert "expected a file of weights (.safetensors, .bin" in refused(tmp_path / "weights.msgpack")


def make(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"circle": path.name, "nothing": "gone", "device": "/dev/zero"}[kind])


NO_FILES = {
    "folder": "expected a file, came a folder",
    "pipe": "expected a file, came a pipe",
    "device": "expected a file, came a pipe, a socket or a device",
    "circle": "symbolic links",
    "nothing": "No such file",
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_weights_that_are_no_file(kind: str, name: str, tmp_path: Path):
    """Opening the pipe would wait for ever."""
    make(kind, tmp_path / name)
    assert NO_FILES[kind] in refused(tmp_path)
    assert name in refused(tmp_path)
    if kind != "folder":
        assert NO_FILES[kind] in refused(tmp_path / name)


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_config_that_is_no_file(kind: str, tmp_path: Path):
    make(kind, tmp_path / "config.json")
    with pytest.raises(
        ValueError, match=r"config\.json: (cannot be read|expected JSON of one object, came: a folder, a)"
    ):
        checkpoint.read_config(tmp_path)


def test_folders_that_go_in_a_circle(tmp_path: Path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert "symbolic links" in refused(tmp_path / "one")
    with pytest.raises(ValueError, match="symbolic links"):
        checkpoint.read_config(tmp_path / "one")


def test_a_file_in_place_of_a_folder(tmp_path: Path):
    file = write(tmp_path, STATE) / "model.safetensors"
    assert "Not a directory" in refused(file / "model.safetensors")
    with pytest.raises(ValueError, match="Not a directory"):
        checkpoint.read_config(file)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, STATE)

    def no(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", no)
    assert "model.safetensors: expected a readable checkpoint, came: Permission denied" in refused(tmp_path)
    monkeypatch.setattr(Path, "stat", no)
    assert f"{tmp_path}: expected a readable checkpoint, came: Permission denied" in refused(tmp_path)


def test_two_layouts_side_by_side(tmp_path: Path):
    write(tmp_path, STATE, 100)
    write(tmp_path, STATE)
    assert "came both, and the index is of other files. Which one is stale?" in refused(tmp_path)


# -------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_safetensors(keep: int, tmp_path: Path):
    file = write(tmp_path, STATE) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: expected a safetensors file, came: " in refused(tmp_path)
    assert "Download it again." in refused(tmp_path)


def test_foreign_safetensors(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    assert "git lfs pull" in refused(tmp_path)
    save_file({"w": np.zeros(3, ml_dtypes.float8_e4m3fn)}, file)
    assert "w is F8_E4M3; one of F64" in refused(tmp_path)


def tensor(first: int, last: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(last - first) // 4] if shape is None else shape, "data_offsets": [first, last]}


def write_raw(folder: Path, header: dict[str, Any] | str, nbytes: int, length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + b"\1" * nbytes)
    return folder


GOOD = {"a": tensor(0, 8), "b": tensor(8, 16)}
HEADERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "overlap": ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "b: expected it to start at byte 8"),
    "gap": ({"a": tensor(0, 8), "b": tensor(12, 16)}, 16, "b: expected it to start at byte 8"),
    "gap before the first": ({"a": tensor(4, 8)}, 8, "a: expected it to start at byte 0"),
    "past the end": ({"a": tensor(0, 8), "b": tensor(8, 2**40)}, 16, "16 bytes of tensors where the header announces"),
    "more at the end": (GOOD, 17, "17 bytes of tensors where the header announces 16"),
    "another shape": ({"a": tensor(0, 8, [3])}, 8, "a: expected data_offsets 12 bytes apart"),
    "offsets the wrong way": ({"a": tensor(8, 0, [2])}, 8, "a: expected data_offsets 8 bytes apart"),
    "negative size": ({"a": tensor(0, 8, [-2])}, 8, "a: expected its dtype, shape and data_offsets"),
    "negative offset": ({"a": tensor(-8, 0, [2])}, 8, "a: expected its dtype, shape and data_offsets"),
    "huge size": ({"a": tensor(0, 8, [10**30])}, 8, "a: expected its dtype, shape and data_offsets"),
    "sizes that overflow": ({"a": tensor(0, 0, [2**62, 4])}, 0, "a: expected a shape that an array can have"),
    "an empty giant": ({"a": tensor(0, 0, [2**62, 2**62, 0])}, 0, "a: expected a shape that an array can have"),
    "axes without end": ({"a": tensor(0, 4, [1] * 65)}, 4, "a: expected a shape that an array can have"),
    "bool for a size": ({"a": tensor(0, 4, [True])}, 4, "a: expected its dtype, shape and data_offsets"),
    "float for a size": ({"a": tensor(0, 4, [1.0])}, 4, "a: expected its dtype, shape and data_offsets"),
    "text for a size": ({"a": tensor(0, 4, ["1"])}, 4, "a: expected its dtype, shape and data_offsets"),
    "unknown dtype": ({"a": tensor(0, 8, None, "X32")}, 8, "a is X32; one of F64"),
    "small dtype": ({"a": tensor(0, 8, None, "f32")}, 8, "a is f32; one of F64"),
    "half a byte": ({"a": tensor(0, 1, [2], "F4")}, 1, "a is F4; one of F64"),
    "number for a dtype": ({"a": tensor(0, 8, None, 32)}, 8, "a: expected its dtype, shape and data_offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a: expected its dtype, shape and data_offsets"),
    "no table": ({"a": None}, 0, "a: expected its dtype, shape and data_offsets"),
    "metadata": ({"__metadata__": {"format": 1}, **GOOD}, 16, "expected a safetensors file"),
    "a name to print": ({"\x1b[2J": tensor(0, 8)}, 8, "characters of no name"),
    "half a letter": ({"\ud800": tensor(0, 8)}, 8, "expected a safetensors file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_cannot_be(case: str, tmp_path: Path):
    header, nbytes, message = HEADERS[case]
    assert message in refused(write_raw(tmp_path, header, nbytes))
    assert "model.safetensors: " in refused(tmp_path)


def test_a_good_header_made_in_the_same_way(tmp_path: Path):
    assert list(TorchFiles.open(write_raw(tmp_path, GOOD, 16)).tensors) == ["a", "b"]


@pytest.mark.parametrize("header", ["", "[]", "{", "null", '{"a":', '{"a":' + "[" * 99999, "\ufeff{}", "9" * 5000])
def test_a_header_that_is_no_table(header: str, tmp_path: Path):
    assert "model.safetensors: expected a safetensors file, came: " in refused(write_raw(tmp_path, header, 0))


@pytest.mark.parametrize("length", [0, 1, 10**4, MAX_JSON, MAX_JSON + 1, 2**63, 2**64 - 1])
def test_a_header_of_another_length(length: int, tmp_path: Path):
    assert "model.safetensors: expected a safetensors file, came: " in refused(write_raw(tmp_path, GOOD, 16, length))


def test_a_header_larger_than_any(tmp_path: Path):
    write_raw(tmp_path, GOOD, 0, MAX_JSON + 1)
    os.truncate(tmp_path / "model.safetensors", 2 * MAX_JSON)  # sparse: it takes no room
    assert f"a header of {MAX_JSON + 1}" in refused(tmp_path)


def test_a_name_that_stands_twice_in_a_header(tmp_path: Path):
    """safetensors itself takes the last one, and the bytes of the first are lost."""
    twice = json.dumps(GOOD)[:-1] + ', "a": ' + json.dumps(tensor(0, 8, [2, 1])) + "}"
    assert safe_open(write_raw(tmp_path, twice, 16) / "model.safetensors", "numpy").get_tensor("a").shape == (2, 1)
    assert "model.safetensors: expected a safetensors file, came: 'a' 2 times" in refused(tmp_path)


def test_flipped_bits_in_a_header(tmp_path: Path):
    """What safetensors refuses is refused, and what is read is what safetensors reads."""
    path = write(tmp_path, STATE) / "model.safetensors"
    good = path.read_bytes()
    both = 0
    for place in range(0, 8 + int.from_bytes(good[:8], "little"), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            theirs = safe_open(path, "numpy")
        except SafetensorError:
            refused(path)
            continue
        try:
            ours = TorchFiles.open(path)
        except ConversionError:
            continue
        assert list(ours.tensors) == theirs.offset_keys()
        for name in ours.tensors:
            assert ours.read(name).tobytes() == theirs.get_tensor(name).tobytes()
        both += 1
    assert both > 10  # a name with another letter in it, say


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path):
    files = TorchFiles.open(write(tmp_path, STATE))
    last = list(files.tensors)[-1]
    os.truncate(files.files[0], files.files[0].stat().st_size - 1)
    with pytest.raises(ConversionError, match=rf"model\.safetensors: {last} was expected whole"):
        files.read(last)


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    files = TorchFiles.open(write(tmp_path, STATE))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error") as raised:
        files.read("conv")
    assert raised.value.filename == str(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------- indexes


def index_of(folder: Path, weight_map: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 99999])
def test_an_index_that_is_none(text: str, tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert 'expected JSON with "weight_map"' in refused(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\secret.safetensors", "C:secret"]
)
def test_an_index_that_points_outside_its_folder(shard: str, tmp_path: Path):
    write(tmp_path, STATE)
    (tmp_path / "model.safetensors").rename(tmp_path / "secret.safetensors")
    message = refused(index_of(tmp_path / "checkpoint", {"scale": shard}))
    assert "outside the folder" in message
    assert repr(shard) in message


@pytest.mark.parametrize("shard", ["", "..", "gone.safetensors", "a\0b", "a" * 5000, "folder", "pipe", "circle"])
def test_an_index_whose_shard_is_missing(shard: str, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    assert "shards that are not there" in refused(index_of(tmp_path, {"scale": shard}))


def test_an_index_and_shards_that_differ(tmp_path: Path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({"a": np.ones(1), "b": np.ones(1)}, one)
    save_file({"b": np.ones(1), "c": np.ones(1)}, two)
    message = refused(index_of(tmp_path, {"a": one.name, "b": two.name, "d": two.name}))
    assert "two shards hold (expected: one); which one is stale?:\n  two.safetensors: b" in message
    assert "their shard lacks; are both of one save?:\n  two.safetensors: d" in message


def test_a_tensor_that_the_index_forgot_is_not_lost(tmp_path: Path):
    save_file({"a": np.ones(1), "b": np.ones(1)}, tmp_path / "one.safetensors")
    assert TorchFiles.open(index_of(tmp_path, {"a": "one.safetensors"})).tensors.keys() == {"a", "b"}


def test_a_name_in_two_shards_of_an_index(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one", "b": "one", "a": "two"}}')
    assert "index.json: expected JSON" in refused(tmp_path)
    assert "'a' 2 times" in refused(tmp_path)


def test_an_index_without_end(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").touch()
    os.truncate(tmp_path / "model.safetensors.index.json", 2**40)  # sparse: it takes no room
    assert f"more than {MAX_JSON} bytes" in refused(tmp_path)


# ------------------------------------------------------------------------------------------------------------- pickles


class Payload:
    """What a hostile checkpoint holds: unpickling it calls something, here one that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_pickle_that_would_run_code_runs_none(mapped: bool, tmp_path: Path):
    torch = pytest.importorskip("torch")
    state = {"weight": torch.ones(2), "payload": Payload(tmp_path / "trace")}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=mapped)
    assert "nothing of it was run" in refused(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_truncated_bin(keep: int, mapped: bool, tmp_path: Path):
    file = write_bin(tmp_path, STATE, mapped=mapped) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    assert "pytorch_model.bin: expected" in refused(tmp_path)


def test_a_bin_that_holds_more_than_a_state_dict(tmp_path: Path):
    torch = pytest.importorskip("torch")
    weight = torch.ones(2, 2)
    for state, came in (
        ({"state_dict": {"weight": weight}}, "dict for 'state_dict'"),
        ({"epoch": 3}, "int for 'epoch'"),
        ([weight], "list for 'the file'"),
        (weight, "Tensor for 'the file'"),
        ({0: weight}, "Tensor for 0"),
        ({"sparse": weight.to_sparse()}, "Tensor for 'sparse'"),
    ):
        torch.save(state, tmp_path / "pytorch_model.bin")
        assert f"expected a state dict of dense tensors, came {came}" in refused(tmp_path)
    torch.save({"w": weight.to(torch.complex64)}, tmp_path / "pytorch_model.bin")
    assert "w is complex64; one of float64" in refused(tmp_path)


def test_bin_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install flax-vlm[torch]" in refused(tmp_path)


def rewrite_zip(path: Path, change: Callable[[zipfile.ZipInfo, bytes], tuple[int, bytes]]) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            method, data = change(entry, data)
            archive.writestr(entry.filename, data, method)


def test_a_zip_bomb(tmp_path: Path):
    """A gigabyte in a megabyte is not what torch.save writes."""
    file = write_bin(tmp_path, {"w": np.zeros(2**18)}) / "pytorch_model.bin"
    rewrite_zip(file, lambda _, data: (zipfile.ZIP_DEFLATED, data))
    assert file.stat().st_size < 2**18
    message = refused(tmp_path)
    assert "pytorch_model.bin: expected entries stored as torch.save stores them, came " in message
    assert " compressed. Do not trust this file" in message


def test_a_zip_that_announces_more_than_it_holds(tmp_path: Path):
    file = write_bin(tmp_path, {"w": np.zeros(3)}) / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    start = data.rindex(b"PK\1\2")
    data[start + 24 : start + 28] = struct.pack("<I", 2**31)  # the size of the last entry of the directory
    file.write_bytes(data)
    assert f"bytes announced in a file of {len(data)}" in refused(tmp_path)


def test_a_flipped_bit_in_a_name(tmp_path: Path):
    """torch.load does not compare checksums."""
    torch = pytest.importorskip("torch")
    file = write_bin(tmp_path, {"layer.0.weight": np.ones(3)}) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes().replace(b"layer.0", b"layer.1"))
    assert list(torch.load(file, weights_only=True)) == ["layer.1.weight"]
    assert "Bad CRC-32" in refused(tmp_path)


def test_one_number_seen_as_a_matrix(tmp_path: Path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "pytorch_model.bin")
    assert "w: expected a tensor whose values are all in the file" in refused(tmp_path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_of_tensors(tmp_path: Path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "pytorch_model.bin")
    assert "expected a state dict of dense tensors" in refused(tmp_path)
