"""The three families on meshes: eight devices in a process of their own, and where each parameter goes."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from flax_vlm import parallel
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPModel
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from tests.parallel.processes import run
from tests.parity import altclip_cases, glm4v_cases, idefics_cases


@pytest.mark.parametrize("family", ["altclip", "idefics", "glm4v"])
def test_sharded_equals_one_device(family: str, tmp_path: Path) -> None:
    (printed,) = run("families_on_eight_devices.py", [family, tmp_path / "checkpoint", "fsdp_tensor"])
    assert printed == "fsdp_tensor: the same\n"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["altclip", "idefics", "glm4v"])
def test_sharded_equals_one_device_by_any_rules(family: str, tmp_path: Path) -> None:
    ways = ["replicated", "fsdp", *(["sequence"] if family == "altclip" else [])]
    (printed,) = run("families_on_eight_devices.py", [family, tmp_path / "checkpoint", *ways])
    assert printed.count("the same") == len(ways)


def specs(boxed: Any, rules: parallel.Rules = parallel.FSDP_TENSOR) -> dict[str, P]:
    """By path, with nothing too small to be split."""
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    placed = parallel.shardings(boxed, mesh, replace(rules, replicate_below=0))
    return {path: sharding.spec for path, sharding in flatten_params(placed).items()}


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_every_parameter_has_a_rule(scan: bool) -> None:
    models = [IdeficsForVisionText2Text(config, scan_layers=scan) for config in idefics_cases.WHOLE.values()]
    models += [AltCLIPModel(altclip_cases.WHOLE, scan_layers=scan), glm4v_cases.model("float32", scan_layers=scan)]
    for model in models:
        whole = [path for path, spec in specs(abstract_params(model)).items() if not any(spec)]
        expected = ("logit_scale", "alpha_cross_attn", "alpha_dense", "transformation/bias")
        assert all(path.endswith(expected) for path in whole), whole


def test_where_parameters_of_altclip_go() -> None:
    assert {
        "text_model/roberta/embeddings/word_embeddings/embedding": P("tensor", "fsdp"),
        "text_model/roberta/encoder/layers_0/attention/self/query/kernel": P("fsdp", "tensor"),
        "text_model/transformation/kernel": P("fsdp", None),
        "vision_model/embeddings/patch_embedding/kernel": P(None, None, None, "fsdp"),
        "logit_scale": P(),
    }.items() <= specs(abstract_params(AltCLIPModel(altclip_cases.WHOLE))).items()


def test_where_parameters_of_idefics_go() -> None:
    assert {
        "model/layers_0/self_attn/q_proj/kernel": P("fsdp", "tensor"),
        "model/layers_0/self_attn/o_proj/kernel": P("tensor", "fsdp"),
        "model/gated_cross_attn_layers_1/cross_attn/k_proj/kernel": P("fsdp", "tensor"),
        "model/gated_cross_attn_layers_1/mlp/down_proj/kernel": P("tensor", "fsdp"),
        "model/gated_cross_attn_layers_1/alpha_dense": P(None, None, "fsdp"),
        "model/perceiver_resampler/latents": P(None, "fsdp"),
        "model/perceiver_resampler/blocks_0/attn/output_proj/kernel": P("tensor", "fsdp"),
        "model/embed_tokens/embedding": P("tensor", "fsdp"),
        "model/embed_tokens/additional_embedding/embedding": P(None, "fsdp"),
        "lm_head/kernel": P("fsdp", "tensor"),
        "lm_head/additional_fc/kernel": P("fsdp", None),
    }.items() <= specs(abstract_params(IdeficsForVisionText2Text(idefics_cases.RESAMPLED))).items()


def test_where_parameters_of_glm4v_go() -> None:
    layer, tower = "transformer/encoder/layers", "transformer/vision"
    assert {
        "transformer/embedding/word_embeddings/embedding": P("tensor", "fsdp"),
        f"{layer}/self_attention/q_proj/kernel": P(None, "fsdp", "tensor"),
        f"{layer}/self_attention/k_proj/kernel": P(None, "fsdp", "tensor"),
        f"{layer}/self_attention/v_proj/bias": P(None, "tensor"),
        f"{layer}/self_attention/dense/kernel": P(None, "tensor", "fsdp"),
        f"{layer}/mlp/gate_proj/kernel": P(None, "fsdp", "tensor"),
        f"{layer}/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
        f"{tower}/patch_embedding/position_embedding": P(None, "fsdp"),
        f"{tower}/transformer/layers/attention/q_proj/kernel": P(None, "fsdp", "tensor"),
        f"{tower}/transformer/layers/mlp/fc2/kernel": P(None, "tensor", "fsdp"),
        f"{tower}/linear_proj/gate_proj/kernel": P("fsdp", "tensor"),
        f"{tower}/linear_proj/dense_4h_to_h/kernel": P("tensor", "fsdp"),
        f"{tower}/boi": P(None, None, "fsdp"),
        "output_layer/kernel": P("fsdp", "tensor"),
    }.items() <= specs(abstract_params(glm4v_cases.model("float32", scan_layers=True))).items()


def test_small_parameters_stay_whole_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    boxed = abstract_params(AltCLIPModel(altclip_cases.WHOLE, scan_layers=True))
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with caplog.at_level(logging.INFO, "flax_vlm"):
        placed = flatten_params(parallel.shardings(boxed, mesh, replace(parallel.FSDP_TENSOR, replicate_below=800)))
    # 24 x 24 in each of three layers, and 24 x 36.
    layer = "text_model/roberta/encoder/layers"
    assert placed[f"{layer}/attention/self/query/kernel"].spec == P()
    assert placed[f"{layer}/intermediate/dense/kernel"].spec == P(None, "fsdp", "tensor")
    (record,) = caplog.records
    assert "parameters of fewer than 800 elements in a layer stay whole on every device" in record.getMessage()
