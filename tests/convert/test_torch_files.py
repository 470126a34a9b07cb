"""Every layout of a PyTorch checkpoint reads alike, what is written reads anywhere, and broken files are named."""

import itertools
import json
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flax_vlm.convert.errors import ConversionError
from flax_vlm.convert.torch_files import InMemory, TensorInfo, TorchFiles
from flax_vlm.convert.torch_writer import write_torch

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
    folder.mkdir(parents=True, exist_ok=True)
    write_torch(folder, state.items(), InMemory(state).tensors, max_shard_size)
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


arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 99, shape).astype(dtype).T,
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.uint8]),
    st.integers(0, 9),
)


@given(
    state=st.dictionaries(st.text('abc.é"\\ ', min_size=1), arrays, min_size=1, max_size=8),
    size=st.integers(1, 400),
    data=st.data(),
)
def test_what_is_written_is_read(state, size: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("checkpoint")
    order = data.draw(st.permutations(list(state)))
    write_torch(folder, ((name, state[name]) for name in order), InMemory(state).tensors, size)
    files = TorchFiles.open(folder)
    assert files.tensors.keys() == state.keys()
    assert all(equal(files.read(name), array) for name, array in state.items())
    assert all(equal(load_file(info.file)[name], state[name]) for name, info in files.tensors.items() if info.file)
    shards = sorted(folder.glob("*.safetensors"))
    sizes = [[state[name].nbytes for name in load_file(shard)] for shard in shards]
    assert all(sum(each) <= size or len(each) == 1 for each in sizes)
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert list(index["weight_map"]) == list(state)
        assert index["metadata"] == {"total_size": sum(array.nbytes for array in state.values())}
    else:
        assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_one_tensor_is_held_at_a_time(tmp_path: Path):
    alive: list[weakref.ref] = []

    def new() -> np.ndarray:
        array = np.ones(3)
        alive.append(weakref.ref(array))
        return array

    def tensors():
        for name in "abc":
            assert all(ref() is None for ref in alive)
            yield name, new()

    write_torch(tmp_path, tensors(), dict.fromkeys("abc", TensorInfo((3,), np.dtype(float))))
    assert len(alive) == 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", np.ones(3)), ("a", np.ones(3))], "a: expected each tensor of the plan once"),
        ([("b", np.ones(3))], "b: expected each tensor of the plan once"),
        ([("a", np.ones(4))], r"a: float64 \(3,\) was planned, float64 \(4,\) came"),
        ([("a", np.ones(3, np.float32))], r"a: float64 \(3,\) was planned, float32 \(3,\) came"),
        ([], "these never came: a"),
    ],
)
def test_what_is_written_is_what_was_planned(tensors, message: str, tmp_path: Path):
    with pytest.raises(ConversionError, match=message):
        write_torch(tmp_path, tensors, {"a": TensorInfo((3,), np.dtype(float))})


def test_a_dtype_that_torch_does_not_read_is_refused(tmp_path: Path):
    with pytest.raises(ConversionError, match=r"w: expected one of .* came int4"):
        write(tmp_path, {"w": np.zeros(2, ml_dtypes.int4)})


# -------------------------------------------------------------------------------------------------------- broken files


def refused(path: Path) -> str:
    with pytest.raises(ConversionError) as raised:
        TorchFiles.open(path)
    return str(raised.value)


def test_a_folder_without_weights(tmp_path: Path):
    assert "came an empty folder" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors" in refused(tmp_path)
    assert "came config.json" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "nowhere")
    (tmp_path / "weights.msgpack").write_bytes(b"x")
    assert "expected a file of weights (.safetensors, .bin" in refused(tmp_path / "weights.msgpack")


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="root reads everything")
def test_an_unreadable_folder(tmp_path: Path):
    file = write(tmp_path, STATE) / "model.safetensors"
    file.chmod(0)
    assert "Permission denied" in refused(tmp_path)


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


def index_of(folder: Path, weight_map: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 99999])
def test_an_index_that_is_none(text: str, tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert 'expected JSON with "weight_map"' in refused(tmp_path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_points_outside_its_folder(shard: str, tmp_path: Path):
    write(tmp_path, STATE)
    (tmp_path / "model.safetensors").rename(tmp_path / "secret.safetensors")
    message = refused(index_of(tmp_path / "checkpoint", {"scale": shard}))
    assert "outside the folder" in message
    assert shard in message


@pytest.mark.parametrize("shard", ["", "..", "gone.safetensors", "a\0b"])
def test_an_index_whose_shard_is_missing(shard: str, tmp_path: Path):
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


def test_bin_tensors_that_share_memory_or_train(tmp_path: Path):
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "b": base.T, "c": torch.nn.Parameter(base[1:])}, tmp_path / "pytorch_model.bin")
    files = TorchFiles.open(tmp_path)
    for name, expected in (("a", base), ("b", base.T), ("c", base[1:])):
        assert equal(files.read(name), expected.numpy())
    assert equal(files.read("b", (slice(1, 3), slice(0, 2))), base.T[1:3, :2].numpy())
