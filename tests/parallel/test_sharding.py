"""Meshes and rules; models on eight devices are tested in a process of their own."""

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
from flax_vlm.models.altclip import AltCLIPModel
from tests.parity import altclip_cases as cases

ROOT = Path(__file__).parent.parent.parent


def test_sharded_altclip_equals_one_device(tmp_path: Path) -> None:
    script = ROOT / "tests" / "parallel" / "on_eight_devices.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "losses and gradients agree" in done.stdout and "read in eighths" in done.stdout


def test_every_parameter_has_named_axes() -> None:
    boxed = abstract_params(AltCLIPModel(cases.WHOLE))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for leaf in leaves:
        shape = nn.meta.unbox(leaf).shape
        assert shape == () or (isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == len(shape))


def test_rules_place_parameters() -> None:
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    placed = flatten_params(parallel.shardings(abstract_params(AltCLIPModel(cases.WHOLE)), mesh))
    query = placed["text_model/roberta/encoder/layers_0/attention/self/query/kernel"]
    assert query.spec == PartitionSpec("fsdp", "tensor")
    assert placed["logit_scale"].spec == PartitionSpec()


def test_a_mesh_must_fill_the_devices() -> None:
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=1 does not fill"):
        parallel.make_mesh(data=3)
