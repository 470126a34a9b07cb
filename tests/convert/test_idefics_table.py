"""IDEFICS' table against the names and shapes of the released models, and the configs that come with them.

transformers 4.40 and 5.23 write the same names.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from benchmarks.conversion import names as released
from flax_vlm.convert import ConversionError, port
from flax_vlm.convert.idefics import TABLES, TIED, WHOLE
from flax_vlm.convert.rules import Drop, match, plan_read, plan_write
from flax_vlm.convert.torch_files import InMemory, TensorInfo
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.idefics import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsModel,
    IdeficsPerceiverResampler,
    IdeficsVisionConfig,
    IdeficsVisionModel,
)

DATA = Path(__file__).parent.parent / "data"
COUNTS = {
    "idefics-9b": (1015, 8_929_679_632),
    "idefics-80b": (1603, 79_967_843_624),
    "tiny-random-idefics": (159, 3_206_089),
}
Names = dict[str, tuple[int, ...]]


@cache
def model(name: str) -> tuple[dict[str, Any], Names]:
    """Its config.json, and name -> shape as the real checkpoint has them."""
    if name in released.available():
        read = released.read(name)
        return read.config, dict(read.tensors)
    listed = (DATA / f"keys_{name}.txt").read_text().split("## full list\n")[1]
    names = {key: tuple(json.loads(shape)) for key, shape in (line.split(" ", 1) for line in listed.splitlines())}
    return json.loads((DATA / f"{name}-config.json").read_text()) | {"model_type": "idefics"}, names


@cache
def params(name: str) -> dict[str, jax.ShapeDtypeStruct]:
    config = IdeficsConfig.from_hf(model(name)[0])
    return flatten_params(nn.meta.unbox(abstract_params(IdeficsForVisionText2Text(config))))


def files(names: Names) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, np.dtype(np.float32)) for name, shape in names.items()}


class FilesOnly(InMemory):
    """Names and shapes without arrays."""

    def __init__(self, names: Names) -> None:
        self.tensors = files(names)


@pytest.mark.parametrize("name", COUNTS)
def test_every_name_matches_one_row_and_fills_one_parameter(name: str) -> None:
    names = model(name)[1]
    assert (len(names), sum(map(math.prod, names.values()))) == COUNTS[name]
    sources = plan_read(WHOLE, files(names), params(name))  # raises for any name, shape or parameter left over
    assert {source.flax for source in sources} == params(name).keys()
    assert [source.torch for source in sources] == list(names)
    assert sum(math.prod(leaf.shape) for leaf in params(name).values()) == COUNTS[name][1]


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("name", COUNTS)
def test_export_writes_those_names(name: str, style: Any) -> None:
    written = {target.torch: target.shape for target in plan_write(WHOLE, params(name), style)}
    assert written == model(name)[1]


def test_buffers_of_old_releases_are_dropped() -> None:
    names = model("idefics-9b")[1]
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in range(32)}
    buffers |= {f"model.gated_cross_attn_layers.{i}.cross_attn.rotary_emb.inv_freq": (64,) for i in range(8)}
    buffers |= {"model.vision_model.embeddings.position_ids": (1, 257)}
    assert len(plan_read(WHOLE, files(names | buffers), params("idefics-9b"))) == 1015
    for name in buffers:
        found = match(WHOLE, name)
        assert found is not None and isinstance(found[0], Drop) and found[0].reason


@pytest.mark.parametrize("with_head", [False, True])
def test_tied(with_head: bool) -> None:
    """The head may be left out, or repeat the embeddings."""
    data, names = model("tiny-random-idefics")
    names = names if with_head else {name: shape for name, shape in names.items() if "lm_head" not in name}
    config = IdeficsConfig.from_hf(data | {"tie_word_embeddings": True})
    planned = port.plan(config, FilesOnly(names))
    assert not any("lm_head" in source.flax for source in planned.sources)
    repeated = [twin.torch for source in planned.sources for twin in source.tied]
    assert repeated == (["lm_head.weight", "lm_head.additional_fc.weight"] if with_head else [])
    written = {target.torch for target in plan_write(TIED, flatten_params(nn.meta.unbox(planned.abstract)))}
    assert written == {name for name in names if "lm_head" not in name}


def test_a_head_that_is_not_tied_is_not_left_out() -> None:
    data, names = model("tiny-random-idefics")
    names = {name: shape for name, shape in names.items() if "lm_head" not in name}
    with pytest.raises(ConversionError, match=r"lm_head/kernel.*\n.*lm_head/additional_fc/kernel|additional_fc"):
        port.plan(IdeficsConfig.from_hf(data), FilesOnly(names))


PARTS = [
    (IdeficsModel, "model."),
    (IdeficsVisionModel, "model.vision_model."),
    (IdeficsPerceiverResampler, "model.perceiver_resampler."),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part, place", PARTS)
def test_parts(part: type[nn.Module], place: str, tied: bool) -> None:
    """Out of the whole model, out of one without a head, and alone."""
    data, names = model("tiny-random-idefics")
    config = IdeficsConfig.from_hf(data | {"tie_word_embeddings": tied})
    inside = [name for name in names if name.startswith(place)]
    for prefix, others in (("", True), ("model.", False), (place, False)):
        kept = names if others else inside
        spelt = {name.removeprefix(prefix): names[name] for name in kept}
        planned = port.plan(config, FilesOnly(spelt), part)
        assert type(planned.model) is part
        assert [source.torch for source in planned.sources] == [name.removeprefix(prefix) for name in inside]


def test_a_base_model_is_what_its_architecture_says() -> None:
    data, names = model("tiny-random-idefics")
    base = {name.removeprefix("model."): shape for name, shape in names.items() if name.startswith("model.")}
    planned = port.plan(IdeficsConfig.from_hf(data), FilesOnly(base), architectures=["IdeficsModel"])
    assert type(planned.model) is IdeficsModel and len(planned.sources) == len(base)


def test_every_name_is_known_to_every_layout() -> None:
    for part in TABLES:
        rows = port.layout_for(part, model("tiny-random-idefics")[1])
        for name in model("tiny-random-idefics")[1]:
            assert match(rows, name) is not None, f"{name} is unknown to the layout of {part}"


def test_faults_are_named_together() -> None:
    names = dict(model("tiny-random-idefics")[1])
    del names["model.gated_cross_attn_layers.1.alpha_dense"]
    names["model.layers.0.mlp.up_proj.weight"] = (11008, 17)
    names["model.layers.2.input_layernorm.weight"] = (16,)  # of a third layer
    names["model.gated_cross_attn_layers.0.cross_attn.q_layer_norm.weight"] = (4,)  # config.json says no norms
    names["lora.down"] = (3, 4)
    with pytest.raises(ConversionError) as caught:
        plan_read(WHOLE, files(names), params("tiny-random-idefics"))
    for part in ("alpha_dense", "(11008, 17)", "(11008, 16)", "layers.2.input", "cross_attn.q_layer_norm", "lora.down"):
        assert part in str(caught.value)


def flat(data: dict[str, Any]) -> dict[str, Any]:
    """The config.json of 2023: what stands in sections now under names of its own."""
    data = dict(data)
    vision, perceiver = data.pop("vision_config"), data.pop("perceiver_config")
    prefixed = {f"vision_{name}": value for name, value in vision.items()}
    return data | prefixed | perceiver | {"architectures": ["IdeficsForCausalLM"], "vision_model_name": "some ViT"}


@pytest.mark.parametrize("name", COUNTS)
def test_configs_of_2023_are_flat(name: str, caplog: pytest.LogCaptureFixture) -> None:
    data = flat(model(name)[0])
    config = registry.read_config(data)
    assert config == IdeficsConfig.from_hf(model(name)[0])
    assert registry.model_class(config, data["architectures"]) is IdeficsForVisionText2Text
    assert not caplog.records, "every key is known"


@pytest.mark.parametrize("name", COUNTS)
def test_configs_there_and_back(name: str) -> None:
    config = IdeficsConfig.from_hf(model(name)[0])
    assert IdeficsConfig.from_hf(config.to_hf()) == config
    assert IdeficsVisionConfig.from_hf(config.vision_config.to_hf()) == config.vision_config


@pytest.mark.torch
def test_configs_are_those_of_transformers() -> None:
    """Defaults, what 5.x writes, and what it reads of ours."""
    import transformers

    assert IdeficsConfig.from_hf(transformers.IdeficsConfig().to_dict()) == IdeficsConfig()
    ours = IdeficsConfig.from_hf(model("idefics-80b")[0] | {"rope_theta": 500.0, "freeze_text_layers": True})
    theirs = transformers.IdeficsConfig(**ours.to_hf())
    assert theirs.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}
    assert theirs.vision_config.embed_dim == 1280
    assert IdeficsConfig.from_hf(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"num_hidden_layers": 3, "cross_layer_interval": 2},
            "num_hidden_layers 3 is not a multiple of cross_",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn': expected 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {'factor': 2, 'type': 'linear'}"),
        ({"rope_theta": 0}, "rope_theta is 0.0: expected a number above 0"),
        ({"alpha_type": "scalar"}, "alpha_type is 'scalar': expected one of float, vector"),
        ({"alpha_initializer": "uniform"}, "alpha_initializer is 'uniform': expected one of zeros, ones"),
        ({"hidden_act": "softsign"}, "unknown activation 'softsign'"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 12}, "heads of 3: rotary positions need an even width"),
        ({"additional_vocab_size": -1}, "additional_vocab_size is -1: expected 0 or more"),
        (
            {"freeze_text_module_exceptions": ["RMSNorm"]},
            "freeze_text_module_exceptions is ['RMSNorm']",
        ),
        ({"vision_config": [1]}, "vision_config is [1]: expected an object"),
        ({"vision_config": {"embed_dim": 33}}, "hidden_size 33 is not a multiple of num_attention_heads 16"),
        ({"perceiver_config": {"resampler_depth": 0}}, "resampler_depth is 0: expected a number above 0"),
        ({"use_resampler": "yes"}, "use_resampler is 'yes': expected bool"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        IdeficsConfig.from_hf(model("tiny-random-idefics")[0] | change)
    assert message in str(caught.value)
