"""Every layout of a PyTorch checkpoint reads alike, and what is written reads anywhere."""

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from flax_vlm import array_files
from flax_vlm.convert.torch_files import TorchFiles
from tests.convert.written import write_torch

STATE = {
    "scale": np.array(2.6592, np.float32),
    "norm": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
    "kernel": np.arange(15, dtype=np.float32).reshape(3, 5).T,  # a view that is not contiguous, as every kernel is
    "conv": np.arange(2 * 3 * 4 * 5, dtype=np.float64).reshape(2, 3, 4, 5),
    "half": np.array([[1, np.inf], [np.nan, -0.0]], np.float16),
    "position_ids": np.arange(6).reshape(1, 6),
    "empty": np.zeros((0, 4), np.float32),
    "mask": np.array([True, False, True]),
}


def equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    same_bits = np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and same_bits


def write(folder: Path, state: Mapping[str, np.ndarray], max_shard_size: int | str = "5GB") -> Path:
    write_torch(folder, state, max_shard_size)
    return folder


def write_bin(folder: Path, state: Mapping[str, np.ndarray], shards: int = 1, mapped: bool = True) -> Path:
    torch = pytest.importorskip("torch")

    def tensor(array: np.ndarray):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(state), {}
    for shard in range(shards):
        mine = names[shard::shards]
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        tensors = {name: tensor(state[name]) for name in mine}
        torch.save(tensors, folder / file, _use_new_zipfile_serialization=mapped)
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda folder: write(folder, STATE),
    "safetensors, sharded": lambda folder: write(folder, STATE, 100),
    "safetensors, one file": lambda folder: write(folder, STATE) / "model.safetensors",
    "safetensors, index": lambda folder: write(folder, STATE, 100) / "model.safetensors.index.json",
    "bin": lambda folder: write_bin(folder, STATE),
    "bin, sharded": lambda folder: write_bin(folder, STATE, 3),
    "bin, before PyTorch 1.6": lambda folder: write_bin(folder, STATE, mapped=False),
    "bin, before PyTorch 1.6, sharded": lambda folder: write_bin(folder, STATE, 3, mapped=False),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_all_layouts_read_alike(layout: Callable[[Path], Path], tmp_path: Path):
    files = TorchFiles.open(layout(tmp_path))
    assert files.tensors.keys() == STATE.keys()
    for name, array in STATE.items():
        info = files.tensors[name]
        assert (info.shape, info.dtype) == (array.shape, array.dtype)
        assert info.file is not None
        assert info.file.parent == tmp_path
        assert equal(files.read(name), array)
        bounds = [(None, None), (0, 1), (1, 3), (-2, None), (1, 99), (2, 2), (3, 1)]
        for index in itertools.product(*([slice(*bound) for bound in bounds] for _ in array.shape[:2])):
            index += (slice(None),) * (array.ndim - len(index))
            assert equal(files.read(name, index), array[index])


def test_slices_with_steps_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="step 1"):
        TorchFiles.open(write(tmp_path, STATE)).read("norm", (slice(0, 4, 2),))


def test_safetensors_come_before_bin(tmp_path: Path):
    write_bin(tmp_path, {"old": STATE["scale"]})
    write(tmp_path, {"new": STATE["scale"]})
    assert list(TorchFiles.open(tmp_path).tensors) == ["new"]


def test_shards_may_be_links_to_elsewhere(tmp_path: Path):
    """As in the cache of the Hub."""
    blobs, snapshot = write(tmp_path / "blobs", STATE, 100), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    assert TorchFiles.open(snapshot).tensors.keys() == STATE.keys()


def test_files_are_the_weights_and_their_index(tmp_path: Path):
    assert [file.name for file in TorchFiles.open(write(tmp_path / "one", STATE)).files] == ["model.safetensors"]
    files = TorchFiles.open(write(tmp_path / "many", STATE, 100)).files
    assert sorted(files) == sorted((tmp_path / "many").iterdir())
    assert files[-1].name == "model.safetensors.index.json"


def test_an_index_of_the_one_file_beside_it(tmp_path: Path):
    weight_map = dict.fromkeys(STATE, "model.safetensors")
    (write(tmp_path, STATE) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(TorchFiles.open(tmp_path).files) == 2


def test_tensors_and_slices_are_read_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = TorchFiles.open(write(tmp_path, STATE))
    read, counts = os.preadv, []

    def in_pieces(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(read(descriptor, [buffers[0][:7]], offset))  # as the system does with what is over 2 GB
        return counts[-1]

    monkeypatch.setattr(os, "preadv", in_pieces)
    kernel = files.read("kernel")
    assert equal(kernel, STATE["kernel"])
    assert isinstance(kernel.base, np.ndarray) and kernel.base.flags.owndata
    assert sum(counts) == kernel.nbytes
    assert equal(files.read("kernel", (slice(1, 4), slice(None))), STATE["kernel"][1:4])
    assert sum(counts) == kernel.nbytes + STATE["kernel"][1:4].nbytes
    assert equal(files.read("kernel", (slice(None), slice(1, 2))), STATE["kernel"][:, 1:2])
    assert sum(counts) == 2 * kernel.nbytes + STATE["kernel"][1:4].nbytes  # of columns, all of their rows


@pytest.mark.parametrize("piece", [1, 8, 50, 200, 10_000])
def test_columns_are_read_in_pieces(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pieces that hold less than a value, some values, a row of the last axes, some rows, everything."""
    monkeypatch.setattr(array_files, "PIECE", piece)
    state = {"conv": STATE["conv"], "norm": STATE["norm"], "kernel": STATE["kernel"].astype(ml_dtypes.bfloat16)}
    files = TorchFiles.open(write(tmp_path, state))
    for name, array in state.items():
        bounds = ([(None, None), (0, 1), (1, size - 1)] for size in array.shape)
        for index in itertools.product(*([slice(*bound) for bound in axis] for axis in bounds)):
            assert equal(files.read(name, index), array[index]), (name, index)


def test_threads_read(tmp_path: Path):
    state = {f"w{i}": np.random.default_rng(i).standard_normal((40, 25)) for i in range(30)}
    files = TorchFiles.open(write(tmp_path, state, 50_000))
    with ThreadPoolExecutor(8) as pool:
        parts = [(name, (rows, slice(None))) for name in state for rows in (slice(0, 13), slice(13, 40))] * 5
        for (name, index), array in zip(parts, pool.map(lambda part: files.read(*part), parts), strict=True):
            assert equal(array, state[name][index])


def test_threads_load_a_pickle_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    files = TorchFiles.open(write_bin(tmp_path, STATE, 3))
    load, loaded = torch.load, []

    def slowly(path: Path, **options: object) -> object:
        loaded.append(path.name)
        time.sleep(0.05)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", slowly)
    first = [name for name, info in files.tensors.items() if info.file == files.files[0]]
    with ThreadPoolExecutor(8) as pool:
        for name, array in zip(first * 4, pool.map(files.read, first * 4), strict=True):
            assert equal(array, STATE[name])
    assert loaded == ["pytorch_model-00001-of-00003.bin"]  # opening the others had put it out of the cache


def test_bin_tensors_that_share_memory_or_train(tmp_path: Path):
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "b": base.T, "c": torch.nn.Parameter(base[1:])}, tmp_path / "pytorch_model.bin")
    files = TorchFiles.open(tmp_path)
    for name, expected in (("a", base), ("b", base.T), ("c", base[1:])):
        assert equal(files.read(name), expected.numpy())
    assert equal(files.read("b", (slice(1, 3), slice(0, 2))), base.T[1:3, :2].numpy())
    torch.save({"minus": torch._neg_view(base)}, tmp_path / "pytorch_model.bin")
    assert equal(TorchFiles.open(tmp_path).read("minus"), -base.numpy())


# ------------------------------------------------------------------------------------------------------------ writing


def test_transposes_survive(tmp_path: Path):
    """safetensors 0.8 writes the memory of W.T as it lies, which is W."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path, {"weight": weight.T, "strided": weight[:, ::2], "flipped": weight[::-1]})
    read = load_file(tmp_path / "model.safetensors")
    assert equal(read["weight"], weight.T)
    assert equal(read["strided"], weight[:, ::2])
    assert equal(read["flipped"], weight[::-1])


def test_each_tensor_is_aligned_to_its_item_size(tmp_path: Path):
    """Readers that map the file take its bytes as they lie."""
    data = (write(tmp_path, STATE) / "model.safetensors").read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    for name, array in STATE.items():
        assert (8 + header_size + header[name]["data_offsets"][0]) % array.itemsize == 0


def test_torch_reads_what_is_written(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    with safe_open(write(tmp_path, STATE) / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it
        for name, array in STATE.items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == array.shape
            assert torch.equal(
                torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)),
                tensor.reshape(-1).view(torch.uint8),
            )
