"""IDEFICS on a mesh: eight devices in a process of their own, and where each parameter goes."""

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
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from tests.parity import idefics_cases as cases

ROOT = Path(__file__).parent.parent.parent


def test_sharded_idefics_equals_one_device(tmp_path: Path) -> None:
    script = ROOT / "tests" / "parallel" / "idefics_on_eight_devices.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "losses and gradients agree" in done.stdout and "slices were read once each" in done.stdout


@pytest.mark.parametrize("name", cases.WHOLE)
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_every_parameter_has_named_axes(name: str, scan: bool) -> None:
    boxed = abstract_params(IdeficsForVisionText2Text(cases.WHOLE[name], scan_layers=scan))
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == len(nn.meta.unbox(leaf).shape)


def test_rules_place_parameters() -> None:
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    placed = flatten_params(parallel.shardings(abstract_params(IdeficsForVisionText2Text(cases.RESAMPLED)), mesh))
    specs = {
        "model/layers_0/self_attn/q_proj/kernel": PartitionSpec("fsdp", "tensor"),
        "model/layers_0/self_attn/o_proj/kernel": PartitionSpec("tensor", "fsdp"),
        "model/gated_cross_attn_layers_1/cross_attn/k_proj/kernel": PartitionSpec("fsdp", "tensor"),
        "model/gated_cross_attn_layers_1/mlp/down_proj/kernel": PartitionSpec("tensor", "fsdp"),
        "model/gated_cross_attn_layers_1/alpha_dense": PartitionSpec(None, None, "fsdp"),
        "model/perceiver_resampler/latents": PartitionSpec(None, "fsdp"),
        "model/perceiver_resampler/blocks_0/attn/output_proj/kernel": PartitionSpec("tensor", "fsdp"),
        "model/embed_tokens/embedding": PartitionSpec("tensor", "fsdp"),
        "model/embed_tokens/additional_embedding/embedding": PartitionSpec(None, "fsdp"),
        "lm_head/kernel": PartitionSpec("fsdp", "tensor"),
        "lm_head/additional_fc/kernel": PartitionSpec("fsdp", None),
    }
    assert {path: placed[path].spec for path in specs} == specs
