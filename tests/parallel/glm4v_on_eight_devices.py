"""Run by test_glm4v_sharding.py in a process with eight CPU devices: sharded is what one device computes."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import flax_vlm
from flax_vlm import convert, parallel
from tests.compiling import jitted
from tests.parity import glm4v_cases as cases
from tests.parity.test_glm4v_splice import IMAGES, batch
from tests.tolerances import FLOAT64, assert_close, assert_gradients_close

# Rows with two pictures, one, none and two that touch.
INPUTS = batch() | {"images": IMAGES, "labels": batch()["input_ids"]}


def loss_and_gradients(vlm: flax_vlm.VLM, inputs: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    def loss(params: dict[str, Any]) -> jax.Array:
        return vlm.model.apply({"params": params}, **inputs).loss

    value, gradients = jitted(jax.value_and_grad(loss))(vlm.params)
    return value, convert.state_dict(vlm.config, jax.device_get(gradients))


def main() -> None:
    assert len(jax.devices()) == 8
    arrays = {key: jax.numpy.asarray(value) for key, value in INPUTS.items()}
    expected_loss, expected = loss_and_gradients(flax_vlm.from_pretrained(cases.GOLDEN, dtype="float64"), arrays)
    assert np.isfinite(expected_loss)
    meshes = {
        # Four devices share two key/value heads: each has half of one.
        "fsdp and tensor": (parallel.make_mesh(data=1, fsdp=2, tensor=4), False),
        "all": (parallel.make_mesh(data=2, fsdp=2, tensor=2), True),
    }
    for name, (mesh, scan_layers) in meshes.items():
        vlm = flax_vlm.from_pretrained(cases.GOLDEN, dtype="float64", mesh=mesh, scan_layers=scan_layers)
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        inputs = {key: jax.device_put(value, rows) for key, value in arrays.items()}
        loss, gradients = loss_and_gradients(vlm, inputs)
        assert_close(loss, expected_loss, FLOAT64, f"loss on mesh {name}")
        assert_gradients_close(gradients, expected)
    print("losses and gradients agree")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
