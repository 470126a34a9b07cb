"""AltCLIP's table against the names and shapes of the full-size model, in all spellings that occur."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.convert import ConversionError, port
from flax_vlm.convert.altclip import ALTCLIP, TABLES
from flax_vlm.convert.layouts import layout_for
from flax_vlm.convert.rules import Drop, Rule, match, plan_read, plan_write
from flax_vlm.convert.torch_files import InMemory, TensorInfo
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPConfig, AltCLIPModel, AltCLIPTextModel, AltCLIPVisionModel, AltRobertaModel

DATA = Path(__file__).parent.parent / "data"
FLOAT32 = np.dtype(np.float32)


def released(version: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape, as the real checkpoint has them."""
    full = (DATA / f"keys_AltCLIP_{version}.txt").read_text().split("## full list\n")[1]
    return {name: tuple(json.loads(shape)) for name, shape in (line.split(" ", 1) for line in full.splitlines())}


def files(names: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, FLOAT32) for name, shape in names.items()}


@pytest.fixture(scope="module")
def config() -> AltCLIPConfig:
    return AltCLIPConfig.from_hf(json.loads((DATA / "AltCLIP-config.json").read_text()))


@pytest.fixture(scope="module")
def params(config: AltCLIPConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten_params(nn.meta.unbox(abstract_params(AltCLIPModel(config))))


def test_full_size(params: dict[str, jax.ShapeDtypeStruct]) -> None:
    assert len(params) == 787
    assert sum(int(np.prod(leaf.shape)) for leaf in params.values()) == 864_186_113


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_every_name_matches_one_row_and_fills_one_parameter(
    version: str, params: dict[str, jax.ShapeDtypeStruct]
) -> None:
    names = released(version)
    sources = plan_read(ALTCLIP, files(names), params)  # raises for any name, shape or parameter left over
    assert {source.flax for source in sources} == params.keys()
    assert [source.torch for source in sources] == list(names)


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_export_writes_the_names_of_that_release(version: str, params: dict[str, jax.ShapeDtypeStruct]) -> None:
    written = {target.torch: target.shape for target in plan_write(ALTCLIP, params, version)}
    assert written == released(version)


def respelt(names: dict[str, tuple[int, ...]], *changes: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    for pattern, replacement in changes:
        names = {re.sub(pattern, replacement, name): shape for name, shape in names.items()}
    return names


SPELLINGS = {
    "as 5.23 saves it": [(r"text_model(.*)encoder\.layer\.", r"text_model\1encoder.layer."), (r"layers", "layer")],
    "gamma and beta": [(r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta")],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings(spelling: str, params: dict[str, jax.ShapeDtypeStruct]) -> None:
    names = respelt(released("v4"), *SPELLINGS[spelling])
    assert names != released("v4")
    plan_read(ALTCLIP, files(names), params)


def test_buffers_of_old_releases_are_dropped(params: dict[str, jax.ShapeDtypeStruct]) -> None:
    buffers = {
        "text_model.roberta.embeddings.position_ids": (1, 514),
        "text_model.roberta.embeddings.token_type_ids": (1, 514),
        "vision_model.embeddings.position_ids": (1, 257),
    }
    infos = files(released("v4")) | {name: TensorInfo(shape, np.dtype(np.int64)) for name, shape in buffers.items()}
    assert len(plan_read(ALTCLIP, infos, params)) == 787
    for name in buffers:
        found = match(ALTCLIP, name)
        assert found is not None and isinstance(found[0], Drop) and found[0].reason


@pytest.mark.parametrize(
    "model, prefix, others",
    [
        (AltCLIPTextModel, "text_model.", True),
        (AltCLIPTextModel, "text_model.", False),
        (AltCLIPTextModel, "", False),
        (AltCLIPVisionModel, "vision_model.", True),
        (AltCLIPVisionModel, "vision_model.", False),  # saved by transformers up to 5.5
        (AltCLIPVisionModel, "", False),  # saved by transformers from 5.12 on
        (AltRobertaModel, "text_model.roberta.", True),
        (AltRobertaModel, "roberta.", False),
        (AltRobertaModel, "", False),
    ],
)
def test_towers(model: type[nn.Module], prefix: str, others: bool, config: AltCLIPConfig) -> None:
    """Out of the whole model, alone under its prefix, and alone without one."""
    place = {AltCLIPTextModel: "text_model.", AltCLIPVisionModel: "vision_model."}.get(model, "text_model.roberta.")
    names = released("v4")
    if not others:
        names = {
            f"{prefix}{name.removeprefix(place)}": shape for name, shape in names.items() if name.startswith(place)
        }
    shapes = files(names)
    planned = port.plan(config, FilesOnly(shapes), model)
    inside = [name for name in names if name.startswith(prefix)] if prefix else list(names)
    assert [source.torch for source in planned.sources] == inside
    assert not getattr(planned.model, "add_pooling_layer", False)


class FilesOnly(InMemory):
    """Names and shapes without arrays."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self.tensors = infos


def test_layouts_of_whole_and_part_exclude_each_other() -> None:
    for model in TABLES:
        layout = layout_for(model, released("v4"))
        for name in released("v4"):
            found = match(layout, name)
            assert found is not None, f"{name} is unknown to the layout of {model}"
            assert isinstance(found[0], Rule | Drop)


def test_faults_are_named_together(params: dict[str, jax.ShapeDtypeStruct]) -> None:
    names = released("v4")
    del names["logit_scale"]
    names["text_projection.weight"] = (768, 767)
    names["text_model.roberta.encoder.layers.0.output.dense.bias"] = (1024,)  # both spellings of one parameter
    names["lora.down"] = (3, 4)
    with pytest.raises(ConversionError) as caught:
        plan_read(ALTCLIP, files(names), params)
    for part in ("logit_scale", "(768, 767)", "(768, 768)", "encoder/layers_0/output/dense/bias", "lora.down"):
        assert part in str(caught.value)
