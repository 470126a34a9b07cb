"""What an export writes, any safetensors reader reads."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from flax_vlm.convert.errors import ConversionError
from flax_vlm.convert.rules import Target, linear
from flax_vlm.convert.torch_files import TorchFiles
from tests.convert.written import write_torch

arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 99, shape).astype(dtype).T,
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.uint8]),
    st.integers(0, 9),
)


def equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    same_bits = np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and same_bits


@given(
    state=st.dictionaries(st.text('abc.é"\\ ', min_size=1), arrays, min_size=1, max_size=8), size=st.integers(1, 400)
)
def test_what_is_written_is_read(state: Any, size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    moved = write_torch(folder, state, size)
    assert moved.nbytes == sum(array.nbytes for array in state.values())
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


def test_a_tensor_of_several_parameters(tmp_path: Path) -> None:
    state = {name: np.arange(rows * 5, dtype=np.float32).reshape(5, rows) for name, rows in (("q", 4), ("k", 3))}
    moved = write_torch(tmp_path, state, targets=[Target("qk", (7, 5), ("q", "k"), linear)])
    np.testing.assert_array_equal(TorchFiles.open(tmp_path).read("qk"), np.concatenate([state["q"].T, state["k"].T]))
    assert moved.sha256.keys() == {"q", "k"}


def test_a_dtype_that_torch_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"w: expected one of .* came int4"):
        write_torch(tmp_path, {"w": np.zeros(2, ml_dtypes.int4)})
    assert not list(tmp_path.iterdir())
