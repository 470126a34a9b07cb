"""Meshes of the axes data, fsdp and tensor, and the start of processes that share one."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, slices: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes data, fsdp, tensor; one of them may be -1 and takes what is left.

    Args:
      slices: of a TPU pod, connected by the slower data-centre network: only `data` runs across them.
      devices: all of them when None.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices, and when these form other slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise ValueError(f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fill {len(devices)} devices")
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if slices != found:
        raise ValueError(f"slices={slices}, but the {len(devices)} devices form {found}: expected slices={found}")
    # Linen leaves the placement of intermediates to the compiler: Auto axes.
    auto = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(sizes, AXES, auto, devices=devices)
    if sizes[0] % slices:
        raise ValueError(f"data={sizes[0]} cannot run across {slices} slices evenly: expected a multiple of {slices}")
    within = [sizes[0] // slices, *sizes[1:]]
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, [slices, 1, 1], devices), AXES, auto)


def start_processes(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Starts JAX on all processes of a job, before anything else asks it for devices; once started, does nothing.

    On Cloud TPU, and under SLURM and Open MPI, JAX finds out by itself; elsewhere every process says the same
    `coordinator` ("host:port" of the first one), how many `processes` there are, and its own `index`, from 0.

    Raises:
      ValueError: for arguments that do not belong together, or none where nothing is found out.
      RuntimeError: when devices have been asked for before.
    """
    if jax.distributed.is_initialized():
        return
    given = [argument is not None for argument in (coordinator, processes, index)]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator={coordinator!r}, processes={processes}, index={index}: expected all three, or none of them"
        )
    if processes is not None and index is not None and not 0 <= index < processes:
        raise ValueError(f"index={index}: expected one from 0 to {processes - 1}, of {processes} processes")
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except ValueError as error:
        raise ValueError(
            f"no cluster that JAX knows was found here: pass coordinator='host:port', processes= and index= ({error})"
        ) from error
