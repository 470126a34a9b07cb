"""Native arrays: what Orbax writes we read, what we write it restores, and damaged ones are never read as zeros."""

import errno
import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flax_vlm
from flax_vlm import array_files, checkpoint, convert
from flax_vlm.array_files import ArrayFiles, chunk_shape
from flax_vlm.layers.param_tree import flatten_params
from tests.convert.test_port import write_hf


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "dense": {"kernel": rng.standard_normal((37, 53)).astype(np.float32), "bias": np.zeros(53, np.float32)},
        "half": rng.standard_normal((4, 5, 6)).astype(ml_dtypes.bfloat16),
        "layers_0": {"a.b": rng.standard_normal(7).astype(np.float16)},
        "count": np.array(3, np.int32),
        "scale": np.array(-0.0, np.float32),
    }


def assert_holds(arrays: ArrayFiles, expected: dict[str, Any]) -> None:
    flat = flatten_params(expected)
    assert arrays.tensors.keys() == flat.keys()
    for path, array in flat.items():
        info = arrays.tensors[path]
        assert (info.shape, info.dtype, info.nbytes) == (array.shape, array.dtype, array.nbytes), path
        read = arrays.read(path)
        assert read.dtype == array.dtype and read.tobytes() == np.ascontiguousarray(array).tobytes(), path
    part = (slice(3, 30), slice(50, 53))
    np.testing.assert_array_equal(arrays.read("dense/kernel", part), flat["dense/kernel"][part])


@pytest.mark.parametrize("zarr3", [False, True], ids=["zarr2", "zarr3"])
@pytest.mark.parametrize("ocdbt", [False, True], ids=["files", "ocdbt"])
def test_what_orbax_wrote(ocdbt: bool, zarr3: bool, tmp_path: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave(tree()))
    assert_holds(ArrayFiles.open(tmp_path / "params"), tree())


def test_what_the_standard_checkpointer_wrote(tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", jax.tree.map(jnp.asarray, tree()))
    assert_holds(ArrayFiles.open(tmp_path / "params"), tree())


def test_what_save_params_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "CHUNK", 1000)
    checkpoint.save_params(tmp_path, tree())
    assert_holds(checkpoint.open_params(tmp_path), tree())
    restored = ocp.StandardCheckpointer().restore(tmp_path / checkpoint.PARAMS)
    jax.tree.map(np.testing.assert_array_equal, restored, tree())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_hf(folder / "hf")
    with pytest.MonkeyPatch.context() as patch:  # many chunks
        patch.setattr(array_files, "BLOCK", 1200)
        patch.setattr(array_files, "CHUNK", 500)
        convert.to_flax(folder / "hf", folder / "native")
    return folder / "native"


def test_slices_of_what_a_conversion_wrote(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any slice, of chunks beside each other and past the edge, is tensorstore's; rows cost no more than themselves."""
    arrays = checkpoint.open_params(converted)
    assert arrays._bare == set(arrays.tensors)
    rng, read, counts = np.random.default_rng(0), os.preadv, []

    def counting(*args: Any) -> int:
        counts.append(read(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    past_edge = beside = 0
    for path, info in arrays.tensors.items():
        store = arrays._store(path).read().result()
        assert arrays.read(path).tobytes() == store.tobytes(), path
        whole_chunks = all(size % chunk == 0 for size, chunk in zip(info.shape, info.chunks, strict=True))
        past_edge += not whole_chunks
        for _ in range(5):
            ends = [sorted(rng.integers(0, size, 2, endpoint=True)) for size in info.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            ours = arrays.read(path, index)
            assert (ours.shape, ours.tobytes()) == (store[index].shape, store[index].tobytes()), (path, index)
        if info.shape and whole_chunks:
            beside += info.shape[1:] != info.chunks[1:]
            counts.clear()
            rows = arrays.read(path, (slice(1, 3), *(slice(None) for _ in info.shape[1:])))
            assert sum(counts) == rows.nbytes, path
    assert past_edge and beside
    with pytest.raises(ValueError, match="step 1"):
        arrays.read(WHERE, (slice(0, 4, 2), slice(None)))


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [53, 1]}}},
        {"shape": [-53]},
        {"node_type": "group"},
        {"something": "new"},
    ],
    ids=str,
)
def test_a_layout_that_is_not_ours_is_tensorstores_to_read(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "params" / "bias"

    def write(places: Any) -> None:
        store = array_files.create_array(places["bias"], (53,), np.dtype(np.float32), (53,))
        store.write(np.ones(53, np.float32)).result()

    array_files.publish(tmp_path / "params", ["bias"], write)
    assert ArrayFiles.open(tmp_path / "params")._bare == {"bias"}
    header = json.loads((folder / "zarr.json").read_text())
    (folder / "zarr.json").write_text(json.dumps(header | change))
    assert ArrayFiles.open(tmp_path / "params")._bare == set()


@pytest.mark.parametrize("with_target", [False, True])
def test_orbax_restores_what_a_conversion_wrote(with_target: bool, converted: Path) -> None:
    expected = flax_vlm.from_pretrained(converted).params
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), expected) if with_target else None
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(converted / checkpoint.PARAMS, target)
        assert checkpointer.metadata(converted / checkpoint.PARAMS) is not None
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert jax.tree.map(lambda leaf: leaf.dtype, restored) == jax.tree.map(lambda leaf: leaf.dtype, expected)


def test_nothing_in_a_checkpoint_says_where_it_was_written(converted: Path) -> None:
    for file in converted.rglob("*"):
        assert file.is_dir() or str(converted.parent).encode() not in file.read_bytes(), file


WHERE = "text_model/roberta/embeddings/word_embeddings/embedding"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing chunk": Path.unlink,
    "empty chunk": lambda chunk: chunk.write_bytes(b""),
    "truncated chunk": lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-1]),
    "longer chunk": lambda chunk: chunk.write_bytes(chunk.read_bytes() + b"0"),
    "folder for a chunk": lambda chunk: (chunk.unlink(), chunk.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_chunk(damage: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    monkeypatch.setattr(array_files, "BLOCK", 1200)
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    chunks = sorted(file for file in (tmp_path / "native" / "params" / WHERE.replace("/", ".") / "c").rglob("*"))
    files = [file for file in chunks if file.is_file()]
    assert len(files) > 3
    damage(files[1])
    arrays = checkpoint.open_params(tmp_path / "native")
    message = rf"word_embeddings\.embedding: cannot be read: {files[1]} was expected .* \d+ bytes\. .* checkpoint again"
    for index in (None, (slice(None), slice(0, 5))):
        with pytest.raises(ValueError, match=message):
            arrays.read(WHERE, index)
    with pytest.raises(ValueError, match=r"word_embeddings\.embedding: cannot be read"):
        flax_vlm.from_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=r"word_embeddings\.embedding: cannot be read"):
        convert.to_torch(tmp_path / "native", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


@pytest.mark.parametrize("zarr3", [False, True], ids=["zarr2", "zarr3"])
def test_a_missing_chunk_of_what_orbax_wrote(zarr3: bool, tmp_path: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=zarr3)) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave(tree()))
    array = tmp_path / "params" / "dense.bias"  # all zeros
    chunk = array / "c" / "0" if zarr3 else array / "0"
    chunk.unlink()
    with pytest.raises(ValueError, match=r"dense\.bias: cannot be read"):
        ArrayFiles.open(tmp_path / "params").read("dense/bias")
    # Earlier Orbax wrote no such chunk in the first place, and said nothing of it.
    metadata = json.loads((tmp_path / "params" / "_METADATA").read_text())
    del metadata["store_array_data_equal_to_fill_value"]
    (tmp_path / "params" / "_METADATA").write_text(json.dumps(metadata))
    np.testing.assert_array_equal(ArrayFiles.open(tmp_path / "params").read("dense/bias"), tree()["dense"]["bias"])


@pytest.mark.parametrize(
    "contents", [None, b"", b"{", b"[]", b"{}", b'{"shape": [2], "data_type": "word"}', b"[" * 100_000]
)
def test_a_damaged_header(contents: bytes | None, tmp_path: Path) -> None:
    checkpoint.save_params(tmp_path, tree())
    header = tmp_path / "params" / "dense.bias" / "zarr.json"
    header.unlink()
    if contents is not None:
        header.write_bytes(contents)
    with pytest.raises(ValueError, match=r"dense\.bias/zarr\.json: expected the header of an array.*checkpoint again"):
        checkpoint.open_params(tmp_path)


@pytest.mark.parametrize("contents", [None, b"", b"{", b"[]", b"{}", b'{"tree_metadata": [1]}', b"[" * 100_000])
def test_a_folder_that_is_no_checkpoint(contents: bytes | None, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "_METADATA").write_bytes(contents)
    with pytest.raises(ValueError, match="expected parameters that Orbax wrote, came"):
        ArrayFiles.open(tmp_path)


def test_an_unreadable_chunk_is_the_systems_fault(tmp_path: Path) -> None:
    """One that is a link to itself: root may read everything."""
    checkpoint.save_params(tmp_path, tree())
    chunk = tmp_path / "params" / "dense.bias" / "c" / "0"
    chunk.unlink()
    chunk.symlink_to(chunk)
    with pytest.raises(OSError, match=r"dense\.bias") as caught:
        checkpoint.open_params(tmp_path).read("dense/bias")
    assert caught.value.errno


def test_a_disk_that_fails(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    arrays = checkpoint.open_params(converted)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        arrays.read(WHERE)
    assert caught.value.filename.endswith("word_embeddings.embedding/c/0/0")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)  # it was cut after its size had been looked at
    with pytest.raises(ValueError, match=r"word_embeddings\.embedding/c/0/0 was expected to be a file of \d+ bytes"):
        arrays.read(WHERE)


def test_a_failure_of_orbax_is_raised_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its own notes of 100 arrays are larger than a file may be here."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
        with pytest.raises(OSError) as caught:
            array_files.publish(tmp_path / "params", [f"a/{i}" for i in range(100)], lambda places: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@given(
    shape=st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    axis=st.integers(0, 3),
    block=st.integers(64, 10**7),
    chunk=st.integers(32, 10**7),
)
def test_chunks(shape: list[int], itemsize: int, axis: int, block: int, chunk: int) -> None:
    axis %= len(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_files, "BLOCK", block)
        patch.setattr(array_files, "CHUNK", min(chunk, block))
        chunks = chunk_shape(tuple(shape), itemsize, axis)
    assert all(1 <= size <= whole for size, whole in zip(chunks, shape, strict=True))
    size = math.prod(chunks) * itemsize
    assert size <= min(chunk, block) or set(chunks) == {1}
    row = math.prod(shape) // shape[axis] * itemsize
    assert chunks[axis] * row <= max(block, row) + 127 * row  # a multiple of 128 rows may be a little more


def test_chunks_of_nothing() -> None:
    assert chunk_shape((), 4, None) == ()
    assert chunk_shape((0, 5), 4, 0) == (1, 5)
    assert chunk_shape((5, 0), 4, 0) == (5, 1)
