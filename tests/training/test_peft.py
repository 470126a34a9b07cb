"""Adapters as PEFT has them: what its formula makes of the file is what ours makes of the adapters."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from flax_vlm import convert
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPModel
from flax_vlm.models.glm4v import GLM4VForConditionalGeneration
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from flax_vlm.training import lora, peft
from flax_vlm.training.lora import LoraConfig
from tests.parity import altclip_cases, glm4v_cases, idefics_cases

MODELS: dict[str, Any] = {
    "altclip": lambda: AltCLIPModel(altclip_cases.WHOLE),
    "idefics": lambda: IdeficsForVisionText2Text(idefics_cases.PLAIN),
    "glm4v": lambda: GLM4VForConditionalGeneration(glm4v_cases.config()),
}
# GLM-4V's keys have no adapter: those of its fused kernel are zeros in the file.
CONFIG = LoraConfig(rank=4, alpha=6.0, targets=r".*layers.*/(q_proj|v_proj|query|value|up_proj|fc1)/kernel")


def noise(tree: Any) -> Any:
    rng = np.random.default_rng(2)
    return unflatten_params({path: rng.standard_normal(leaf.shape) for path, leaf in flatten_params(tree).items()})


def made(family: str) -> tuple[Any, Any, Any]:
    """Model, parameters and adapters, one entry a layer, in float64."""
    model = MODELS[family]()
    params = noise(nn.meta.unbox(abstract_params(model)))
    return model, params, noise(lora.init(CONFIG, params, jax.random.key(0)))


@pytest.mark.parametrize(
    ("family", "key_style"), [("altclip", "v4"), ("altclip", "v5"), ("idefics", "v5"), ("glm4v", "v5")]
)
def test_there_and_back(family: str, key_style: Any, tmp_path: Path, x64: None) -> None:
    model, params, adapters = made(family)
    peft.save(tmp_path, model, params, adapters, CONFIG, base_model="someone/something", key_style=key_style)

    data = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (data["peft_type"], data["r"], data["lora_alpha"]) == ("LORA", 4, 6.0)
    assert len(tensors) == 2 * len(data["target_modules"])
    before = convert.state_dict(model.config, params, type(model), key_style)
    after = convert.state_dict(model.config, lora.merged(params, adapters, CONFIG), type(model), key_style)
    for name, kernel in before.items():
        module, delta = name.removesuffix(".weight"), np.zeros(kernel.shape)
        if module in data["target_modules"]:
            down, up = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
            rank, alpha = data["rank_pattern"].get(module, 4), data["alpha_pattern"].get(module, 6.0)
            assert len(down) == up.shape[1] == rank
            delta = alpha / rank * up @ down
            assert np.abs(delta).max() > 1
        np.testing.assert_allclose(after[name] - kernel, delta, rtol=1e-12, atol=1e-12, err_msg=name)

    shapes = jax.eval_shape(lambda: params)
    config, loaded = peft.load(tmp_path, model, shapes)
    assert (config.rank, config.alpha) == (4, 6.0)
    expected = flatten_params(lora.merged(params, adapters, CONFIG))
    for path, leaf in flatten_params(lora.merged(params, loaded, config)).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-12, atol=1e-12, err_msg=path)


def test_layers_of_a_scan_are_numbered_by_the_whole_model(tmp_path: Path, x64: None) -> None:
    """Only the second layer of each block has an adapter: layers 1 and 3."""
    model, params, _ = made("idefics")
    config = LoraConfig(rank=3, targets="model/blocks/layers_1/self_attn/q_proj/kernel")
    stacked = idefics_cases.stacked(params)
    adapters = noise(lora.init(config, stacked, jax.random.key(0)))
    peft.save(tmp_path, model.clone(scan_layers=True), stacked, adapters, config)
    _, loaded = peft.load(tmp_path, model, params)
    assert loaded["model"].keys() == {"layers_1", "layers_3"}
    found = flatten_params(idefics_cases.stacked(lora.merged(params, loaded, config)))
    for path, leaf in flatten_params(lora.merged(stacked, adapters, config)).items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-13, err_msg=path)


def test_what_peft_may_have_changed_of_the_scale(tmp_path: Path, x64: None) -> None:
    model, params, adapters = made("altclip")
    peft.save(tmp_path, model, params, adapters, CONFIG)
    file = tmp_path / "adapter_config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"use_rslora": True, "alpha_pattern": {"query": 10.0}}))
    config, loaded = peft.load(tmp_path, model, params)
    leaves, found = flatten_params(adapters), flatten_params(loaded)
    for path, leaf in leaves.items():
        scale = (10 if "/query/" in path else 6) / 4**0.5 / config.scale if path.endswith("lora_b") else 1
        np.testing.assert_allclose(found[path], scale * leaf, rtol=1e-14, err_msg=path)


def test_what_does_not_fit(tmp_path: Path, x64: None) -> None:
    model, params, adapters = made("altclip")
    peft.save(tmp_path, model, params, adapters, CONFIG)
    weights, file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, data = load_file(weights), json.loads(file.read_text())
    first = "base_model.model.text_model.roberta.encoder.layers.0.attention.self.query.lora_{}.weight"
    del tensors[first.format("A")]
    tensors["base_model.model.text_model.nothing.lora_A.weight"] = np.ones((4, 24), np.float32)
    tensors["base_model.model.text_projection.weight"] = np.ones((11, 14), np.float32)
    key = first.replace("query", "value").format("B")
    tensors[key] = tensors[key][:7]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"does not fit a AltCLIPModel, 4 faults") as error:
        peft.load(tmp_path, model, params)
    said = str(error.value)
    assert "layers.0.attention.self.query: a kernel (24, 24) was expected, came the factors of one None" in said
    assert "layers.0.attention.self.value: a kernel (24, 24) was expected, came the factors of one (24, 7)" in said
    assert "text_model.nothing: a kernel None was expected" in said
    assert "base_model.model.text_projection.weight: " in said

    for change in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}):
        file.write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=r"expected plain LoRA without biases, came .*\. Merge it with PEFT"):
            peft.load(tmp_path, model, params)
