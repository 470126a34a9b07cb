"""Tensors in blocks, both ways: byte for byte what they were, with the hashes of what they are, in little memory."""

import errno
import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_vlm import array_files
from flax_vlm.array_files import ArrayFiles
from flax_vlm.convert import native_writer, stream, torch_writer
from flax_vlm.convert.errors import ConversionError
from flax_vlm.convert.native_writer import write_params
from flax_vlm.convert.rules import Axes, Rule, Target, Tied, conv, identity, linear, plan_read, plan_write
from flax_vlm.convert.stream import cast
from flax_vlm.convert.torch_files import BY_NAME, InMemory, TorchFiles
from flax_vlm.convert.torch_writer import write_tensors
from flax_vlm.layers.param_tree import is_float
from flax_vlm.whole_folder import whole_folder
from tests.convert.written import write_torch

ROOT = Path(__file__).parent.parent.parent
HEADS = Axes("1 n d -> n d")
TRANSFORMS = {identity: 2, linear: 2, conv: 4, HEADS: 2, Axes("a b c -> c b a"): 3, Axes("1 a 1 b -> b a"): 2}

SIZES = st.integers(0, 5) | st.integers(0, 300)  # past 128, where chunks are multiples of it


@st.composite
def tables(draw: Any) -> tuple[list[Rule], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows, tensors of any bits, and what they should become."""
    rules, state, params = [], {}, {}
    for i in range(draw(st.integers(1, 6))):
        transform = draw(st.sampled_from(list(TRANSFORMS)))
        ndim = draw(st.integers(0, 4)) if transform is identity else TRANSFORMS[transform]
        ours = draw(st.tuples(*[SIZES] * ndim).filter(lambda shape: math.prod(shape) < 4000))
        axis = transform.slowest_axis(ndim)
        fused = axis is not None and not transform.pattern.startswith("1") and draw(st.booleans())
        rows = draw(st.lists(st.integers(0, 20), min_size=2, max_size=3)) if fused else [None]
        paths = [f"part_{part}/{i}/kernel" for part in range(len(rows))]
        dtype, seed = draw(st.sampled_from(list(BY_NAME.values()))), draw(st.integers(0, 99))
        tensors = []
        for part, size in enumerate(rows):
            shape = [size if each == axis and size is not None else whole for each, whole in enumerate(ours)]
            tensors.append(bits(transform.torch_shape(tuple(shape)), dtype, seed + part))
        rules.append(Rule(f"t{i}.weight", tuple(paths), transform))
        state[f"t{i}.weight"] = np.concatenate(tensors) if fused else tensors[0]
        params |= {path: transform.to_flax(tensor) for path, tensor in zip(paths, tensors, strict=True)}
    return rules, state, params


def bits(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """An array of any bits at all: NaN with payloads, infinities, denormals and -0.0 are among them."""
    rng = np.random.default_rng(seed)
    count = math.prod(shape)
    if dtype == np.bool_:
        return rng.integers(0, 2, count).astype(bool).reshape(shape)
    random_bits = rng.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
    if dtype.kind not in "iu" and count:
        special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, 1e-7], np.float32).astype(dtype)
        where = rng.random(count) < 0.3
        random_bits[where] = special[rng.integers(0, len(special), where.sum())]
    return random_bits.reshape(shape)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def same_bits(actual: np.ndarray, expected: np.ndarray) -> bool:
    facts = [(each.dtype, each.shape, np.ascontiguousarray(each).tobytes()) for each in (actual, expected)]
    return facts[0] == facts[1]


def count_nonfinite(array: np.ndarray) -> int:
    return int(np.count_nonzero(~np.isfinite(array.astype(np.float64)))) if is_float(array.dtype) else 0


@pytest.mark.slow
@settings(max_examples=100)
@given(
    table=tables(),
    block=st.sampled_from([1, 500, 2000, 8000]),
    chunk=st.sampled_from([64, 300, 5000]),
    dtype=st.sampled_from([None, None, np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]),
)
@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
def test_there_and_back(
    table: Any, block: int, chunk: int, dtype: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Byte for byte, cast or not, and with the hashes of it."""
    rules, state, params = table
    folder = tmp_path_factory.mktemp("there and back")
    with pytest.MonkeyPatch.context() as patch:
        for module in (array_files, torch_writer):
            patch.setattr(module, "BLOCK", block)
        patch.setattr(array_files, "CHUNK", chunk)
        patch.setattr(stream, "PIECE", 64)
        patch.setattr(os, "fsync", lambda _: None)  # nothing dies here, and disks are slow
        files = InMemory(state)
        sources = plan_read(rules, files.tensors, params)
        with whole_folder(folder / "native") as draft:
            there = write_params(draft, sources, files, dtype=dtype)
        arrays = ArrayFiles.open(folder / "native" / "params")
        with whole_folder(folder / "back") as draft:
            back = write_tensors(draft, plan_write(rules, arrays.tensors), arrays, max_shard_size=1000)

    read = TorchFiles.open(folder / "back")
    assert read.tensors.keys() == state.keys() and arrays.tensors.keys() == params.keys()
    for name, tensor in state.items():
        assert same_bits(read.read(name), cast(tensor, dtype)), name
    hashes, odd = {}, {}
    for source in sources:
        param = cast(params[source.flax], dtype)
        assert same_bits(arrays.read(source.flax), param), source.flax
        tensor = np.ascontiguousarray(source.transform.to_torch(param))
        hashes[source.flax] = hashlib.sha256(tensor.tobytes()).hexdigest()
        if count_nonfinite(tensor):
            odd[source.flax] = count_nonfinite(tensor)
    assert there.sha256 == back.sha256 == hashes
    assert there.nonfinite == back.nonfinite == odd
    assert there.nbytes == back.nbytes == sum(cast(tensor, dtype).nbytes for tensor in state.values())


def test_parts_of_several_dtypes_are_not_narrowed_unasked(tmp_path: Path) -> None:
    state = {"q": np.ones((2, 3), ml_dtypes.bfloat16), "k": np.full((2, 3), 1.001, np.float32)}
    targets = [Target("qk", (6, 2), ("q", "k"), linear)]
    with pytest.raises(ConversionError, match="qk: expected parts of one dtype, came bfloat16 and float32"):
        write_torch(tmp_path, state, targets=targets)
    assert list(tmp_path.iterdir()) == []


def test_what_is_noted_is_on_the_disk() -> None:
    """Each tensor is moved, then flushed, then noted."""
    moved, flushed, noted = set(), set(), set()

    class Journal:
        done: dict[str, Any] = {}

        def note(self, entries: dict[str, Any]) -> None:
            assert flushed >= entries.keys() and noted.isdisjoint(entries)
            noted.update(entries)

    def move(name: str) -> dict[str, stream.Content]:
        moved.add(name)
        return {name: stream.Content()}

    def flush(names: list[str]) -> None:
        assert moved >= set(names)
        flushed.update(names)

    names = [str(i) for i in range(50)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "GROUP", 100)
        stream.Stream(Journal(), dict.fromkeys(names, 30), None).run(names, move, flush)  # pyright: ignore[reportArgumentType] - a stand-in
    assert noted == set(names)


def test_what_the_system_refuses_tensorstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files is the one real refusal that needs no disk of its own."""
    monkeypatch.setattr(stream, "GROUP", 1)
    state = {"small": np.ones(1000, np.float32), "large": np.ones(100_000, np.float32)}
    rules = [Rule(name, name) for name in state]
    files = InMemory(state)
    sources = plan_read(rules, files.tensors, state)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(OSError) as caught, whole_folder(tmp_path / "target", job=1) as draft:
            write_params(draft, sources, files, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value.filename).endswith("arrays/large")
    with whole_folder(tmp_path / "target", job=1) as draft:
        assert write_params(draft, sources, files).resumed == 4000


def test_tied_tensors_that_differ_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is found in the middle: another try would find it again."""
    monkeypatch.setattr(stream, "GROUP", 1)
    monkeypatch.setattr(array_files, "BLOCK", 1000)
    state = {"one": np.ones((500, 50), np.float32), "two": np.ones((500, 50), np.float32), "more": np.ones(3)}
    rules = [Rule("more", "more"), Rule("one", "one", linear), Tied("two", "one", linear)]
    files = InMemory(state)
    sources = plan_read(rules, files.tensors, {"one": state["one"].T, "more": state["more"]})
    state["two"][499, 49] = 2
    refused = pytest.raises(ConversionError, match="two was expected to equal one")
    with refused, whole_folder(tmp_path / "target", job=1) as draft:
        write_params(draft, sources, files)
    assert list(tmp_path.iterdir()) == []


def test_after_one_chunk_fails_the_others_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of chunks some cannot be written: nothing writes on into a draft that is removed."""
    monkeypatch.setattr(array_files, "CHUNK", 64)
    create = native_writer.create_array

    def obstructed(folder: Any, *arguments: Any) -> Any:
        store = create(folder, *arguments)
        for chunk in range(0, 3000, 100):
            (folder / "c" / "0" / str(chunk)).mkdir(parents=True)  # where a file is to be
        return store

    monkeypatch.setattr(native_writer, "create_array", obstructed)
    state = {"row": np.ones((1, 48_000), np.float32)}
    files = InMemory(state)
    sources = plan_read([Rule("row", "row")], files.tensors, state)
    with pytest.raises(IsADirectoryError), whole_folder(tmp_path / "target") as draft:
        write_params(draft, sources, files)
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import sys, threading, time
from pathlib import Path

import orbax.checkpoint, tensorstore
from flax_vlm.array_files import ArrayFiles
from flax_vlm.convert.native_writer import write_params
from flax_vlm.convert.rules import Rule, linear, plan_read, plan_write
from flax_vlm.convert.torch_files import TensorInfo, TorchFiles
from flax_vlm.convert.torch_writer import write_tensors
from flax_vlm.whole_folder import whole_folder
from tests.convert.written import write_torch

def anonymous():  # what is not page cache
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

folder = Path(sys.argv[1])
files = TorchFiles.open(folder / "hf")
rules = [Rule("{i}.weight", "layers_{i}/kernel", linear)]
ours = {f"layers_{name.split('.')[0]}/kernel": TensorInfo(info.shape[::-1], info.dtype)
        for name, info in files.tensors.items()}
peak = start = anonymous()
threading.Thread(target=watch, daemon=True).start()
with whole_folder(folder / "native") as draft:
    moved = write_params(draft, plan_read(rules, files.tensors, ours), files)
print("to_flax", moved.nbytes, peak - start)
peak = start
arrays = ArrayFiles.open(folder / "native" / "params")
with whole_folder(folder / "back") as draft:
    moved = write_tensors(draft, plan_write(rules, arrays.tensors), arrays)
print("to_torch", moved.nbytes, peak - start)
"""


@pytest.mark.slow
def test_memory_stays_at_a_few_blocks(tmp_path: Path) -> None:
    """Of 1.2 GB, no more than the blocks of four threads, and XLA, which starts meanwhile."""
    try:
        (tmp_path / "hf").mkdir()
        shapes = {"0.weight": [20_000, 8000], **{f"{i}.weight": [4096, 4096] for i in range(1, 9)}}
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (tmp_path / "hf" / "model.safetensors").open("wb") as file:  # a sparse one: all zeros
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        command = [sys.executable, "-c", MEMORY, tmp_path]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        for line in done.stdout.splitlines():
            function, nbytes, growth = line.split()
            assert int(nbytes) == end > 1.1e9
            assert int(growth) < 700e6, f"{function}: {int(growth):,} bytes"
        assert len(done.stdout.splitlines()) == 2
        print(done.stdout)
    finally:
        shutil.rmtree(tmp_path)
