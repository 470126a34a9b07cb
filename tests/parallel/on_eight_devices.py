"""Run by test_sharding.py in a process of its own, with eight CPU devices: sharded is what one device computes."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import flax_vlm
from flax_vlm import convert, parallel
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.layers.param_tree import flatten_params
from tests.convert.test_port import write_hf
from tests.parity import altclip_cases as cases
from tests.tolerances import FLOAT64, FLOAT64_GRADIENT, assert_close, assert_gradients_close

INPUTS = cases.texts(rows=8) | {"pixel_values": cases.images(8)}


def loss_and_gradients(vlm: flax_vlm.VLM, inputs: dict) -> tuple:
    def loss(params: dict) -> jax.Array:
        return vlm.model.apply({"params": params}, **inputs, return_loss=True).loss

    return jax.jit(jax.value_and_grad(loss))(vlm.params)


def main(folder: Path) -> None:
    write_hf(folder / "hf", np.float64)
    convert.to_flax(folder / "hf", folder / "native")
    single = flax_vlm.from_pretrained(folder / "hf")
    assert len(jax.devices()) == 8
    expected_loss, expected = loss_and_gradients(single, INPUTS)
    expected = convert.state_dict(cases.WHOLE, expected)

    cases_by_name = {
        "data": (parallel.make_mesh(data=8), "hf", False),
        "fsdp": (parallel.make_mesh(data=1, fsdp=8), "native", False),
        "all": (parallel.make_mesh(data=2, fsdp=2, tensor=2), "hf", True),
        "all, native": (parallel.make_mesh(data=2, fsdp=2, tensor=2), "native", True),
    }
    for name, (mesh, layout, scan_layers) in cases_by_name.items():
        vlm = flax_vlm.from_pretrained(folder / layout, mesh=mesh, scan_layers=scan_layers)
        spread = [leaf for leaf in jax.tree.leaves(vlm.params) if not leaf.sharding.is_fully_replicated]
        assert bool(spread) == (name != "data"), f"{name}: {len(spread)} parameters are split"
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        inputs = {key: jax.device_put(value, batch) for key, value in INPUTS.items()}
        loss, gradients = loss_and_gradients(vlm, inputs)
        assert_close(loss, expected_loss, FLOAT64, f"loss on mesh {name}")
        assert_gradients_close(convert.state_dict(cases.WHOLE, gradients), expected, FLOAT64_GRADIENT)
    print("losses and gradients agree")
    each_device_reads_its_own_slice(folder / "hf", parallel.make_mesh(data=1, fsdp=8))


def each_device_reads_its_own_slice(folder: Path, mesh: jax.sharding.Mesh) -> None:
    """No parameter that is split over the devices is ever read whole."""
    largest: dict[str, int] = {}
    read = TorchFiles.read

    def spy(self: TorchFiles, name: str, index: tuple | None = None) -> np.ndarray:
        array = read(self, name, index)
        largest[name] = max(largest.get(name, 0), array.size)
        return array

    TorchFiles.read = spy
    vlm = flax_vlm.from_pretrained(folder, mesh=mesh)
    split = 0
    for target in convert.state_dict(cases.WHOLE, vlm.params).items():
        name, whole = target
        assert largest[name] <= whole.size
        split += largest[name] * 8 == whole.size
    leaves = flatten_params(vlm.params).values()
    assert split == sum(not leaf.sharding.is_fully_replicated for leaf in leaves) > 0
    print(f"{split} parameters were read in eighths")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    main(Path(sys.argv[1]))
