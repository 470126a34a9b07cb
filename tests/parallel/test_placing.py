"""Arrays onto devices: each slice is read once, in one process and in several; other meshes are tested beside."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from flax_vlm import checkpoint, convert, parallel
from flax_vlm.convert.torch_files import TorchFiles
from tests.convert import test_idefics_files
from tests.convert.test_port import write_hf
from tests.parallel.processes import free_address, run
from tests.parity import idefics_cases


def test_arrays_on_one_device() -> None:
    arrays = {
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
        "scalar": np.array(5, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "half": np.array([1, np.nan, -0.0], ml_dtypes.bfloat16),
    }
    reads: list[str] = []

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        reads.append(name)
        return arrays[name][index]

    device = SingleDeviceSharding(jax.devices()[0])
    placed = parallel.place({name: array.shape for name, array in arrays.items()}, dict.fromkeys(arrays, device), read)
    assert sorted(reads) == sorted(arrays) and list(placed) == list(arrays)
    for name, array in arrays.items():
        assert placed[name].dtype == array.dtype
        assert np.asarray(placed[name]).tobytes() == array.tobytes()
    shapes = {name: array.shape for name, array in arrays.items()}
    cast = parallel.place(shapes, dict.fromkeys(arrays, device), read, np.float16)
    assert {name: array.dtype.name for name, array in cast.items()} == {
        "matrix": "float16",
        "scalar": "int32",
        "empty": "float16",
        "half": "float16",
    }


@pytest.mark.parametrize("cast", [None, np.float16])
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_what_was_read_becomes_the_array_without_a_copy(layout: str, cast: Any, folder: Path) -> None:
    files = TorchFiles.open(folder / layout) if layout == "hf" else checkpoint.open_params(folder / layout)
    held: dict[str, np.ndarray] = {}

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        held[name] = files.read(name, index)
        return held[name]

    shapes = {name: info.shape for name, info in files.tensors.items()}
    device = SingleDeviceSharding(jax.devices("cpu")[0])
    placed = parallel.place(shapes, dict.fromkeys(shapes, device), read, cast)
    taken = [placed[name].unsafe_buffer_pointer() == array.ctypes.data for name, array in held.items()]
    assert not any(taken) if cast else all(taken)
    for name, array in held.items():
        assert np.asarray(placed[name]).tobytes() == array.astype(cast or array.dtype).tobytes()


def test_an_error_of_one_read_is_raised() -> None:
    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        raise ValueError(f"{name}: damaged")

    device = SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="w: damaged"):
        parallel.place({"w": (2, 2)}, {"w": device}, read)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_hf(folder / "hf")
    convert.to_flax(folder / "hf", folder / "native")
    test_idefics_files.write_hf(folder / "idefics", idefics_cases.RESAMPLED)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_reads_what_its_devices_hold(processes: int, folder: Path) -> None:
    address = free_address()
    for out in run("reads_of_a_process.py", *([folder, processes, i, address] for i in range(processes))):
        assert "fsdp, native" in out and "data, native" in out
        assert ("restored" in out) == (processes == 1)
