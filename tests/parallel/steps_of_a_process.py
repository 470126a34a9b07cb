"""Run by test_processes.py, once for each process of a mesh of eight devices: a few steps of gradient descent."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import flax_vlm
from flax_vlm import parallel
from tests.parity import altclip_cases as cases

BATCH = cases.texts(rows=8) | {"pixel_values": cases.images(8)}


def losses(folder: Path, mesh: jax.sharding.Mesh, target: Path) -> list[float]:
    """Of a few steps, behind which the parameters are saved."""
    rules = replace(parallel.FSDP, replicate_below=0)
    vlm = flax_vlm.from_pretrained(folder, mesh=mesh, rules=rules)
    index, count = parallel.process_share(mesh, rules)
    own = {key: np.split(array, count)[index] for key, array in BATCH.items()}

    def step(params: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return vlm.model.apply({"params": params}, **batch, return_loss=True).loss

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda leaf, gradient: leaf - 300 * gradient, params, gradients), value

    params, found = vlm.params, []
    with parallel.use(mesh, rules):
        batch = parallel.global_batch(mesh, rules, own)
        compiled = jax.jit(step)
        for _ in range(3):
            params, value = compiled(params, batch)
            found.append(float(value))
    vlm.params = params
    vlm.save_pretrained(target)
    with pytest.raises(OSError, match=r"exists|the first process cannot write"):
        vlm.save_pretrained(target)
    return found


def alone_refuses() -> None:
    """Nobody to meet, and a batch that eight devices cannot share."""
    with pytest.raises(ValueError, match="pass coordinator='host:port', processes= and index="):
        parallel.start_processes()
    with pytest.raises(ValueError, match="a batch of 12 rows does not split over the mesh: expected a multiple of 8"):
        parallel.global_batch(parallel.make_mesh(), "replicated", {"ids": np.zeros((12, 2))})


def together_refuse() -> None:
    """Devices 2 and 4, of two processes, to hold the same rows."""
    devices = np.array(jax.devices())[[0, 1, 2, 4, 3, 5, 6, 7]].reshape(4, 1, 2)
    with pytest.raises(ValueError, match="some processes share a part of their rows"):
        parallel.process_share(jax.sharding.Mesh(devices, ("data", "fsdp", "tensor")))


def main(folder: Path, target: Path, processes: int, process: int, address: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        parallel.start_processes(address, processes, process)
        parallel.start_processes(address, processes, process)  # a second time does nothing
        together_refuse()
    else:
        alone_refuses()
    mesh, narrow = parallel.make_mesh(data=1, fsdp=8), parallel.make_mesh(data=1, tensor=8)
    shares = [parallel.process_share(each) for each in (mesh, parallel.make_mesh(tensor=4), narrow)]
    print(json.dumps({"shares": shares, "losses": losses(folder, mesh, target)}))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
