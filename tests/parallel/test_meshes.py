"""Meshes, over slices too, and what is refused; several processes are started in test_processes.py."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from flax_vlm import parallel


@dataclass(frozen=True)
class Device:
    """As far as a mesh looks at it; nothing is computed on it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "none"


def pod(slices: int, per_slice: int) -> list[Any]:
    """Devices of several slices, out of order."""
    return [Device(100 * s + i, s) for i in range(per_slice) for s in reversed(range(slices))]


def test_one_axis_takes_what_is_left() -> None:
    devices = pod(1, 12)
    assert dict(parallel.make_mesh(fsdp=3, devices=devices).shape) == {"data": 4, "fsdp": 3, "tensor": 1}
    assert dict(parallel.make_mesh(data=1, fsdp=-1, tensor=2, devices=devices).shape)["fsdp"] == 6
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"fsdp": 5}, {"data": -1, "fsdp": -1}, {"data": -1, "fsdp": 24}, {"data": 0}]
)
def test_a_mesh_must_fill_the_devices(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="does not fill 12 devices"):
        parallel.make_mesh(**sizes, devices=pod(1, 12))


def test_only_data_runs_across_slices() -> None:
    mesh = parallel.make_mesh(data=4, fsdp=3, tensor=2, slices=2, devices=pod(2, 12))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 3, "tensor": 2}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.array([0, 0, 1, 1])[:, None, None]).all()
    assert len({device.id for device in mesh.devices.flat}) == 24


def test_slices_are_those_of_the_devices() -> None:
    with pytest.raises(ValueError, match="slices=1, but the 24 devices form 2: expected slices=2"):
        parallel.make_mesh(devices=pod(2, 12))
    with pytest.raises(ValueError, match="slices=2, but the 12 devices form 1"):
        parallel.make_mesh(slices=2, devices=pod(1, 12))
    with pytest.raises(ValueError, match="data=3 cannot run across 2 slices evenly"):
        parallel.make_mesh(data=3, fsdp=8, slices=2, devices=pod(2, 12))


def test_processes_are_named_in_full() -> None:
    with pytest.raises(ValueError, match="processes=2, index=None: expected all three, or none"):
        parallel.start_processes("localhost:1234", 2)
    with pytest.raises(ValueError, match="index=2: expected one from 0 to 1, of 2 processes"):
        parallel.start_processes("localhost:1234", 2, 2)
