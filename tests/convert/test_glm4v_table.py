"""GLM-4V's table against the names and shapes of the released model, and the configs that come with it."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from benchmarks.conversion import names as released
from flax_vlm import convert
from flax_vlm.convert import ConversionError, port, verification
from flax_vlm.convert.glm4v import TABLES, WHOLE
from flax_vlm.convert.rules import Drop, match, plan_read, plan_write
from flax_vlm.convert.torch_files import InMemory, TensorInfo, TorchFiles
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.glm4v import EVA2CLIPModel, GLM4VConfig, GLM4VForConditionalGeneration, GLM4VModel
from tests.parity import glm4v_cases as cases

GOLDEN = Path(__file__).parent.parent / "golden" / "glm4v"
Names = dict[str, tuple[int, ...]]
BUFFER = "transformer.rotary_pos_emb.inv_freq"


@cache
def names() -> Names:
    return dict(released.read("glm-4v-9b").tensors)


def config(**changes: Any) -> GLM4VConfig:
    return GLM4VConfig.from_hf(released.read("glm-4v-9b").config | changes)


def golden_config() -> GLM4VConfig:
    return registry.read_config(json.loads((GOLDEN / "config.json").read_text()))


@cache
def params() -> dict[str, jax.ShapeDtypeStruct]:
    return flatten_params(nn.meta.unbox(abstract_params(GLM4VForConditionalGeneration(config()))))


def files(names: Names) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, np.dtype(np.float32)) for name, shape in names.items()}


class FilesOnly(InMemory):
    """Names and shapes without arrays."""

    def __init__(self, names: Names) -> None:
        self.tensors = files(names)


def test_every_name_matches_one_row_and_every_parameter_is_filled_once() -> None:
    assert len(names()) == 1054
    sources = plan_read(WHOLE, files(names()), params())  # raises for any name, shape or parameter left over
    assert sorted(source.flax for source in sources) == sorted(params())
    assert {source.torch for source in sources} == names().keys() - {BUFFER}
    assert sum(math.prod(leaf.shape) for leaf in params().values()) == 13_906_320_896


def test_export_writes_those_names() -> None:
    written = {target.torch: target.shape for target in plan_write(WHOLE, params())}
    assert written == {name: shape for name, shape in names().items() if name != BUFFER}


def test_the_buffer_is_dropped_for_a_reason() -> None:
    found = match(WHOLE, BUFFER)
    assert found is not None and isinstance(found[0], Drop) and "rope_ratio" in found[0].reason


PARTS = [(GLM4VModel, "transformer."), (EVA2CLIPModel, "transformer.vision.")]


@pytest.mark.parametrize("part, place", PARTS)
def test_parts(part: type[nn.Module], place: str) -> None:
    """Out of the whole model, and alone."""
    whole = {name: info.shape for name, info in TorchFiles.open(GOLDEN).tensors.items()}
    inside = {name for name in whole if name.startswith(place)} - {BUFFER, "transformer.output_layer.weight"}
    alone = {name.removeprefix(place): whole[name] for name in inside}
    for spelt, prefix in ((whole, ""), (alone, place)):
        planned = port.plan(golden_config(), FilesOnly(spelt), part)
        assert type(planned.model) is part
        assert {source.torch for source in planned.sources} == {name.removeprefix(prefix) for name in inside}


@pytest.mark.parametrize("name", ["text", "vision"])
def test_towers(name: str) -> None:
    whole = TorchFiles.open(GOLDEN)
    part = registry.tower(GLM4VForConditionalGeneration, name)
    planned = port.plan(golden_config(), whole, part)
    assert all(("vision" in source.torch) == (name == "vision") for source in planned.sources)
    assert (planned.model.config.vision_config is None) == (name == "text")  # pyright: ignore[reportAttributeAccessIssue]


def test_every_name_is_known_to_every_layout() -> None:
    for part in TABLES:
        rows = port.layout_for(part, names())
        for name in names():
            assert match(rows, name) is not None, f"{name} is unknown to the layout of {part}"


def test_a_text_model_has_no_vision() -> None:
    """glm-4-9b is written by the same code, without a tower."""
    text = {name: shape for name, shape in names().items() if ".vision." not in name}
    planned = port.plan(config(vision_config=None), FilesOnly(text))
    assert sum(math.prod(source.shape) for source in planned.sources) == 9_399_951_360


def test_faults_are_named_together() -> None:
    faulty = dict(names())
    del faulty["transformer.encoder.layers.7.self_attention.query_key_value.bias"]
    faulty["transformer.vision.linear_proj.dense_h_to_4h.weight"] = (27392, 4096)  # fused as the decoder's is
    faulty["transformer.encoder.layers.40.input_layernorm.weight"] = (4096,)
    faulty["transformer.prefix_encoder.embedding.weight"] = (128, 20480)
    with pytest.raises(ConversionError) as caught:
        plan_read(WHOLE, files(faulty), params())
    for part in ("layers_7/self_attention/k_proj/bias", "(27392, 4096)", "layers.40.input", "prefix_encoder"):
        assert part in str(caught.value)


def test_fused_rows_are_where_the_reference_has_them() -> None:
    """Queries, keys, values; gate and what it gates; in the adapter two tensors."""
    rows = {source.flax: source.rows for source in plan_read(WHOLE, files(names()), params())}
    layer = "transformer/encoder/layers_3"
    spans = [rows[f"{layer}/self_attention/{p}_proj/{kind}"] for kind in ("kernel", "bias") for p in "qkv"]
    assert spans == 2 * [slice(0, 4096), slice(4096, 4352), slice(4352, 4608)]
    assert rows[f"{layer}/mlp/gate_proj/kernel"] == slice(0, 13696)
    assert rows[f"{layer}/mlp/up_proj/kernel"] == slice(13696, 27392)
    tower = "transformer/vision/transformer/layers_62/attention"
    spans = [rows[f"{tower}/{p}_proj/kernel"] for p in "qkv"]
    assert spans == [slice(0, 1792), slice(1792, 3584), slice(3584, 5376)]
    assert rows["transformer/vision/linear_proj/dense_h_to_4h/kernel"] is None


def test_there_and_back_is_exact() -> None:
    """The golden checkpoint, bit for bit, but for the buffer."""
    files = TorchFiles.open(GOLDEN)
    state = {name: files.read(name) for name in files.tensors}
    back = convert.state_dict(golden_config(), convert.from_state_dict(golden_config(), state))
    assert back.keys() == state.keys() - {BUFFER}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.torch
def test_forward_runs_what_transformers_has(tmp_path: Path) -> None:
    """Its port of the text model; of the whole there is only code that came with the weights."""
    cases.torch_decoder("float32").save_pretrained(tmp_path / "glm")
    for name, source in (("text", tmp_path / "glm"), ("whole", GOLDEN)):
        convert.to_flax(source, tmp_path / name)
    found = verification.verify(tmp_path / "glm", tmp_path / "text", forward=True)
    assert found.equal and found.outputs.keys() == {"logits"}, found.report()
    with pytest.raises(ConversionError, match="has no ChatGLMModel: compare values alone"):
        verification.verify(GOLDEN, tmp_path / "whole", forward=True)


@pytest.mark.parametrize("source", ["released", "golden"])
def test_configs_there_and_back(source: str, caplog: pytest.LogCaptureFixture) -> None:
    data = json.loads((GOLDEN / "config.json").read_text()) if source == "golden" else released.read("glm-4v-9b").config
    read = registry.read_config(data)
    assert registry.model_class(read, data["architectures"]) is GLM4VForConditionalGeneration
    assert registry.read_config(read.to_hf()) == read
    changed = {name: value for name, value in data.items() if name in read.to_hf() and read.to_hf()[name] != value}
    assert not changed and read.rope_theta == 10000
    assert not caplog.records, "every key is known"


@pytest.mark.torch
@pytest.mark.parametrize("release", [4, 5])
def test_configs_of_transformers(release: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its `glm`, with rotary parameters as each release writes them; a base as glm-4-9b-chat-hf has it."""
    import transformers

    data = transformers.GlmConfig(hidden_size=96, head_dim=20, rope_parameters={"rope_theta": 5e6}).to_dict()
    if release == 4:
        del data["rope_parameters"]
        data |= {"rope_theta": 5e6, "partial_rotary_factor": 0.5}
    read = registry.read_config(data)
    assert (read.hidden_size, read.kv_channels, read.rope_theta, read.seq_length) == (96, 20, 5e6, 131072)
    assert replace(read, hidden_size=4096, kv_channels=128, rope_ratio=1.0, seq_length=8192) == GLM4VConfig()
    assert not caplog.records, "every key is known"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pre_seq_len": 128}, "pre_seq_len is 128: expected null, the PrefixEncoder of p-tuning is not supported"),
        ({"add_bias_linear": True}, "add_bias_linear is True: expected False, the only one supported"),
        ({"original_rope": False}, "original_rope is False: expected True"),
        ({"rmsnorm": False}, "rmsnorm is False: expected True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is set: expected false"),
        ({"rope_ratio": 0}, "rope_ratio is 0.0: expected a number above 0"),
        ({"kv_channels": 126}, "kv_channels is 126: expected a multiple of 4"),
        ({"multi_query_group_num": 3}, "num_attention_heads 32 is not a multiple of multi_query_group_num 3"),
        ({"boi_token_id": None}, "boi_token_id is None: pictures need one below 151552"),
        ({"eoi_token_id": 151339}, "boi_token_id and eoi_token_id are both 151339: expected two ids"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']: expected a token id, or a list of them"),
        ({"vision_config": {"image_size": 1134}}, "image_size 1134 and patch_size 14: expected an even number"),
        ({"vision_config": {"num_positions": 6400}}, "num_positions is 6400: expected 6401"),
        ({"vision_config": {"num_heads": 15}}, "hidden_size 1792 is not a multiple of num_heads 15"),
        ({"vision_config": {"hidden_act": "gelu_10"}}, "unknown activation 'gelu_10'"),
        ({"vision_config": {"scaling_factor": 0}}, "scaling_factor is 0.0: expected a number above 0"),
        ({"model_type": "glm", "partial_rotary_factor": 1.0}, "partial_rotary_factor is 1.0: expected 0.5"),
        ({"model_type": "glm", "rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn': expected 'default'"),
        ({"model_type": "glm", "hidden_act": "gelu"}, "hidden_act is 'gelu': expected 'silu'"),
        ({"model_type": "glm", "rope_scaling": {"factor": 2}}, "rope_scaling is {'factor': 2}: expected null"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(**change)
    assert message in str(caught.value)
