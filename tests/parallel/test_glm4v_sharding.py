"""GLM-4V on a mesh: eight devices in a process of their own, and where each parameter goes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from flax_vlm import parallel
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models.abstract import abstract_params
from tests.parity import glm4v_cases as cases

ROOT = Path(__file__).parent.parent.parent


def test_sharded_glm4v_equals_one_device() -> None:
    script = ROOT / "tests" / "parallel" / "glm4v_on_eight_devices.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "losses and gradients agree" in done.stdout


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_every_parameter_has_named_axes(scan: bool) -> None:
    boxed = abstract_params(cases.model("float32", scan_layers=scan))
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == len(nn.meta.unbox(leaf).shape)


def test_rules_place_parameters() -> None:
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    placed = flatten_params(parallel.shardings(abstract_params(cases.model("float32")), mesh))
    layer, tower = "transformer/encoder/layers_0", "transformer/vision"
    specs = {
        "transformer/embedding/word_embeddings/embedding": PartitionSpec("tensor", "fsdp"),
        f"{layer}/self_attention/q_proj/kernel": PartitionSpec("fsdp", "tensor"),
        f"{layer}/self_attention/k_proj/kernel": PartitionSpec("fsdp", "tensor"),
        f"{layer}/self_attention/v_proj/bias": PartitionSpec("tensor"),
        f"{layer}/self_attention/dense/kernel": PartitionSpec("tensor", "fsdp"),
        f"{layer}/mlp/gate_proj/kernel": PartitionSpec("fsdp", "tensor"),
        f"{layer}/mlp/down_proj/kernel": PartitionSpec("tensor", "fsdp"),
        f"{tower}/patch_embedding/position_embedding": PartitionSpec(None, "fsdp"),
        f"{tower}/transformer/layers_2/attention/q_proj/kernel": PartitionSpec("fsdp", "tensor"),
        f"{tower}/transformer/layers_2/mlp/fc2/kernel": PartitionSpec("tensor", "fsdp"),
        f"{tower}/linear_proj/gate_proj/kernel": PartitionSpec("fsdp", "tensor"),
        f"{tower}/linear_proj/dense_4h_to_h/kernel": PartitionSpec("tensor", "fsdp"),
        f"{tower}/boi": PartitionSpec(None, None, "fsdp"),
        "output_layer/kernel": PartitionSpec("fsdp", "tensor"),
    }
    assert {path: placed[path].spec for path in specs} == specs
