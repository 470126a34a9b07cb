"""Run by test_idefics_sharding.py in a process with eight CPU devices: sharded is what one device computes."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import flax_vlm
from flax_vlm import convert, parallel
from flax_vlm.convert.torch_files import TorchFiles
from tests.compiling import jitted
from tests.convert.test_idefics_files import write_hf
from tests.parity import idefics_cases as cases
from tests.tolerances import FLOAT64, assert_close, assert_gradients_close

CONFIGS = {"resampled": cases.RESAMPLED, "tied": cases.TIED}
INPUTS = cases.inputs(padding_side="left")
INPUTS |= {"labels": cases.labels(INPUTS)}


def loss_and_gradients(vlm: flax_vlm.VLM, inputs: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    def loss(params: dict[str, Any]) -> jax.Array:
        return vlm.model.apply({"params": params}, **inputs).loss

    value, gradients = jitted(jax.value_and_grad(loss))(vlm.params)
    return value, convert.state_dict(vlm.config, jax.device_get(gradients))


def main(folder: Path) -> None:
    assert len(jax.devices()) == 8
    expected = {}
    for name, config in CONFIGS.items():
        write_hf(folder / name, config, np.float64)
        expected[name] = loss_and_gradients(flax_vlm.from_pretrained(folder / name), INPUTS)
    convert.to_flax(folder / "resampled", folder / "native")
    meshes = {
        "data and tensor": (parallel.make_mesh(data=4, tensor=2), "resampled", "resampled", False),
        "fsdp and tensor": (parallel.make_mesh(data=1, fsdp=4, tensor=2), "resampled", "native", False),
        "all": (parallel.make_mesh(data=2, fsdp=2, tensor=2), "tied", "tied", True),
    }
    for name, (mesh, config, layout, scan_layers) in meshes.items():
        vlm = flax_vlm.from_pretrained(folder / layout, mesh=mesh, scan_layers=scan_layers)
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        inputs = {key: jax.device_put(value, batch) for key, value in INPUTS.items()}
        loss, gradients = loss_and_gradients(vlm, inputs)
        expected_loss, expected_gradients = expected[config]
        assert_close(loss, expected_loss, FLOAT64, f"loss on mesh {name}")
        assert_gradients_close(gradients, expected_gradients)
    print("losses and gradients agree")
    each_slice_is_read_once(folder / "resampled", parallel.make_mesh(data=1, fsdp=4, tensor=2))


def each_slice_is_read_once(folder: Path, mesh: jax.sharding.Mesh) -> None:
    """No slice is read twice, and all of them together are the file."""
    reads: Counter[tuple[str, str]] = Counter()
    entries: Counter[str] = Counter()
    read = TorchFiles.read

    def spy(self: TorchFiles, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        array = read(self, name, index)
        reads[name, str(index)] += 1
        entries[name] += array.size
        return array

    TorchFiles.read = spy
    vlm = flax_vlm.from_pretrained(folder, mesh=mesh)
    assert set(reads.values()) == {1}
    state = convert.state_dict(vlm.config, vlm.params)
    assert entries == {name: array.size for name, array in state.items()}
    split = [leaf for leaf in jax.tree.leaves(vlm.params) if not leaf.sharding.is_fully_replicated]
    assert len(reads) > len(state) and len(split) > 60
    print(f"{len(reads)} slices were read once each")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    main(Path(sys.argv[1]))
