"""GLM-4V against the arrays of THUDM's own code, and its decoder against transformers' `GlmForCausalLM`.

Only slots that hold something are compared: what padding attends is left to each implementation.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_vlm
from flax_vlm import convert, generation
from flax_vlm.layers import attention, rotary
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.glm4v import GLM4VConfig, GLM4VForCausalLM, GLM4VForConditionalGeneration, decoder
from flax_vlm.models.glm4v.splice import splice
from tests.parity import glm4v_cases as cases
from tests.tolerances import BFLOAT16_RATIO, FLOAT32, FLOAT64, assert_close, assert_gradients_close, error

DTYPES = {"float64": FLOAT64, "float32": FLOAT32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_intermediate_of_the_decoder(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot by slot: in double from the pictures on, in float32 from what stands in the slots."""
    with jax.enable_x64(dtype == "float64"):
        golden = cases.oracle(dtype)
        model, params = cases.model(dtype), cases.params(dtype)
        if dtype == "float64":
            arrays = cases.inputs("img", dtype)
        else:
            positions = jnp.asarray(golden["img.position_ids_expanded"], jnp.int32)
            arrays = {"inputs_embeds": jnp.asarray(golden["img.text.inputs_embeds"]), "position_ids": positions}

        def run(params: Any, arrays: Any) -> Any:
            """What comes out, what its modules give, and what attention takes and gives in each layer."""
            watched: list[tuple[Any, ...]] = []
            turning: list[Any] = []

            def attend(query: Any, key: Any, value: Any, **how: Any) -> Any:
                attended, weights = attention.attend(query, key, value, **how)
                watched.append((query, key, value, attended))
                return attended, weights

            def rotate(states: Any, by: Any) -> Any:
                turning.append(by)
                return rotary.rotate_interleaved(states, by)

            monkeypatch.setattr(decoder, "attend", attend)
            monkeypatch.setattr(decoder, "rotate_interleaved", rotate)
            capture = {"capture_intermediates": True, "mutable": "intermediates"}
            out, captured = model.apply(
                {"params": params}, **arrays, cache=model.init_cache(2, 28), output_hidden_states=True, **capture
            )
            return out, captured["intermediates"]["transformer"]["encoder"], watched, turning[0]

        out, inner, watched, turned = jax.jit(run)(params, arrays)
        found = {f"hidden_states{i}": states for i, states in enumerate(out.hidden_states)}
        found |= {
            "logits": out.logits,
            "text.inputs_embeds": out.hidden_states[0],
            "text.rope_rows": jnp.stack(turned, axis=-1)[:, :, 0],
            "text.final_layernorm": inner["final_layernorm"]["__call__"][0],
        }
        for i, (kept, (query, key, value, attended)) in enumerate(zip(out.cache.layers, watched, strict=True)):
            layer = inner[f"layers_{i}"]
            part = layer["self_attention"]
            name, group = f"text.layer{i}", query.shape[2] // key.shape[2]
            found |= {
                name: out.hidden_states[i + 1],
                f"{name}.input_layernorm": layer["input_layernorm"]["__call__"][0],
                f"{name}.qkv": jnp.concatenate([part[f"{p}_proj"]["__call__"][0] for p in "qkv"], axis=-1),
                f"{name}.q_rope": query.swapaxes(1, 2),
                f"{name}.k_rope_repeated": key.repeat(group, axis=2).swapaxes(1, 2),
                f"{name}.v_repeated": value.repeat(group, axis=2).swapaxes(1, 2),
                f"{name}.context": attended.reshape(2, 28, -1),
                f"{name}.attention": part["__call__"][0][0],
                f"{name}.mlp": layer["mlp"]["__call__"][0],
                f"cache{i}.key": kept.key.swapaxes(1, 2),
                f"cache{i}.value": kept.value.swapaxes(1, 2),
            }
        inside = ("img.text.", "img.cache", "img.hidden_states", "img.logits")
        assert {f"img.{name}" for name in found} == {name for name in golden if name.startswith(inside)}
        for name, array in found.items():
            assert_close(array, golden[f"img.{name}"], DTYPES[dtype], name)
        np.testing.assert_array_equal(out.cache.next_position, [13, 13])


@pytest.mark.parametrize("case, dtype", [("text", "float64"), ("text", "float32"), ("pad", "float64")])
def test_logits(case: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        golden = cases.oracle(dtype)
        out = cases.forward(cases.model(dtype), cases.params(dtype), cases.inputs(case, dtype))
        there = golden.get(f"{case}.attention_mask_expanded", np.ones(out.logits.shape[:2])) != 0
        assert_close(np.asarray(out.logits)[there], golden[f"{case}.logits"][there], DTYPES[dtype], "logits")


def rms_error(actual: Any, expected: np.ndarray) -> float:
    actual = np.asarray(jnp.asarray(actual, jnp.float32), np.float64)
    return float(np.sqrt(np.mean(np.square(actual - expected))))


@pytest.mark.parametrize("case", ["img", "pad"])
def test_float32_with_pictures(case: str) -> None:
    """Pictures are small beside words, and the first norm makes their rounding large: 4e-5 between the original's own
    float32 and float64, at the worst of all logits. So ours are compared with double, by the RMS of their errors:
    the original's is 6.5e-6, ours 4e-6 or 7e-6, as the processor's vectors are long.
    """
    exact = cases.oracle("float64")[f"{case}.logits"]
    out = cases.forward(cases.model("float32"), cases.params("float32"), cases.inputs(case, "float32"))
    there = cases.oracle("float64").get(f"{case}.attention_mask_expanded", np.ones(exact.shape[:2])) != 0
    assert rms_error(out.logits[there], exact[there]) <= FLOAT32 * np.sqrt(np.square(exact[there]).mean())


def test_positions_and_masks_of_slots() -> None:
    for case in ("img", "pad"):
        golden, inputs = cases.oracle("float64"), cases.inputs(case, "float32")
        given, (begin, end) = golden[f"in.{case}.position_ids"], cases.config().picture_ids
        is_token = inputs["attention_mask"] != 0
        place = jax.jit(partial(splice, begin=begin, end=end, images=1, patches=16))
        slots = place(inputs["input_ids"], is_token)
        np.testing.assert_array_equal(slots.spread(jnp.asarray(given)), golden[f"{case}.position_ids_expanded"])
        mask = golden.get(f"{case}.attention_mask_expanded", np.ones(slots.token.shape))
        np.testing.assert_array_equal(slots.spread(is_token) & slots.is_there, mask != 0)


@pytest.mark.parametrize("scan", [False, True])
def test_loss_and_gradients(scan: bool, x64: None) -> None:
    """Of layers one by one, and of a scan that recomputes them."""
    golden = cases.oracle("float64")
    labels = golden["loss.labels_expanded"]
    arrays = cases.inputs("img")
    labels = np.concatenate([labels[:, :6], labels[:, 21:]], axis=1)  # of the ids: one placeholder for 16 patches
    arrays["labels"] = jnp.asarray(labels)
    model = cases.model(scan_layers=True, remat="full") if scan else cases.model()
    params = cases.params("float64")
    (loss, out), gradients = cases.loss_and_gradients(model)(stack_params(params) if scan else params, arrays)
    np.testing.assert_array_equal(out.slots.labels(arrays["labels"]), golden["loss.labels_expanded"])
    assert_close(loss, golden["loss.value"], FLOAT64, "loss")
    expected = {name.removeprefix("grad."): each for name, each in golden.items() if name.startswith("grad.")}
    assert_gradients_close(convert.state_dict(cases.config(), gradients), expected)


@pytest.mark.parametrize("case", ["img", "pad"])
def test_greedy_ids(case: str) -> None:
    """A picture takes sixteen slots and one position; the answer goes on from the positions."""
    golden = cases.oracle("float32")
    inputs = cases.inputs(case, "float32")
    options = generation.GenerationConfig(
        max_new_tokens=6, output_logits=True, pad_token_id=cases.config().pad_token_id
    )
    out = generation.generate(cases.model("float32"), cases.params("float32"), inputs, options)
    np.testing.assert_array_equal(out.sequences[:, inputs["input_ids"].shape[1] :], golden[f"{case}.greedy.tokens"])
    assert out.logits is not None
    for step in range(6):
        expected = golden[f"{case}.greedy.logits"][:, step]
        np.testing.assert_array_equal(out.logits[step].argmax(-1), expected.argmax(-1))


def _columns(order: list[int]) -> Any:
    """Heads of 16 channels with their channels in another order."""
    index = np.concatenate([np.arange(0, 128, 16)[:, None] + np.array(order)], axis=1).ravel()

    def permuted(leaf: Any) -> Any:
        return leaf[..., index[: leaf.shape[-1]]]

    return permuted


def _mistaken(name: str, layer: dict[str, Any], number: int) -> None:
    """Changes the parameters of a layer so that a right program computes what a mistaken one would."""
    attention, mlp = layer["self_attention"], layer["mlp"]
    query = attention["q_proj"]
    if name == "rotary in halves instead of neighbours":
        permuted = _columns([0, 4, 1, 5, 2, 6, 3, 7, *range(8, 16)])
        attention |= {p: jax.tree.map(permuted, attention[p]) for p in ("q_proj", "k_proj")}
    elif name == "groups tiled instead of repeated":
        heads = np.arange(64).reshape(4, 16)[[0, 2, 1, 3]].ravel()
        attention["q_proj"] = jax.tree.map(lambda leaf: leaf[..., heads], query)
        attention["dense"] = {"kernel": attention["dense"]["kernel"][heads]}
    elif name == "gate and up swapped":
        mlp |= {"gate_proj": mlp["up_proj"], "up_proj": mlp["gate_proj"]}
    elif name == "scores divided by the layer's number":
        attention["q_proj"] = jax.tree.map(lambda leaf: leaf / (number + 1), query)


MISTAKES = {
    "rotary in halves instead of neighbours": 6.2,
    "groups tiled instead of repeated": 8.3,
    "gate and up swapped": 6.7,
    "scores divided by the layer's number": 2.0,
    "positions of patches counted": 6.6,
    "rope_ratio of glm-4-9b-chat": 2.7,
    "epsilon of 1e-5": 1.4e-2,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_known_mistakes_show(name: str) -> None:
    """By as much as they changed the logits of the original, where each was made on purpose."""
    golden, params = cases.oracle("float32"), cases.params("float32")
    inputs, model = cases.inputs("img", "float32"), cases.model("float32")
    for i in range(3):
        _mistaken(name, params["transformer"]["encoder"][f"layers_{i}"], i)
    if name == "positions of patches counted":
        inputs = {"inputs_embeds": jnp.asarray(golden["img.text.inputs_embeds"])}
    elif name == "rope_ratio of glm-4-9b-chat":
        model = model.clone(config=replace(model.config, rope_ratio=500.0))
    elif name == "epsilon of 1e-5":
        model = model.clone(config=replace(model.config, layernorm_epsilon=1e-5))
    found = np.abs(np.asarray(cases.forward(model, params, inputs).logits) - golden["img.logits"]).max()
    assert 0.9 < found / MISTAKES[name] < 1.1


def test_dropout() -> None:
    """Where the config has it, and not unless asked for."""
    config = replace(cases.config(), vision_config=None)
    params, inputs = cases.params("float32"), cases.inputs("text")
    rngs = {"dropout": jax.random.key(0)}

    def logits(model: GLM4VForConditionalGeneration, deterministic: bool) -> np.ndarray:
        run = jax.jit(lambda params: model.apply({"params": params}, **inputs, deterministic=deterministic, rngs=rngs))
        return np.asarray(run(params).logits)

    plain = logits(GLM4VForConditionalGeneration(config), False)
    for changes in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        model = GLM4VForConditionalGeneration(replace(config, **changes))
        np.testing.assert_array_equal(logits(model, True), plain)
        assert error(logits(model, False), plain) > 0.1


def test_conversion_and_loading(tmp_path: Path) -> None:
    """To a native checkpoint and back; loaded from each. The checkpoint says how to generate."""
    convert.to_flax(cases.GOLDEN, tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "torch")
    expected = flatten_params(cases.params("float32"))
    for folder in (cases.GOLDEN, tmp_path / "native", tmp_path / "torch"):
        vlm = flax_vlm.from_pretrained(folder, dtype="float32")
        assert isinstance(vlm.model, GLM4VForConditionalGeneration) and vlm.config == cases.config()
        found = flatten_params(vlm.params)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[path], expected[path]) for path in expected)
        options = vlm.generation_config
        assert options is not None and options.stop_ids == (300, 307, 309) and options.pad_token_id == 300
        assert options.do_sample and (options.temperature, options.top_p, options.max_length) == (0.8, 0.8, 8192)
    convert.to_flax(cases.GOLDEN, tmp_path / "text", model_class=GLM4VForCausalLM)
    for folder in (cases.GOLDEN, tmp_path / "native", tmp_path / "text"):
        text = flax_vlm.from_pretrained(folder, model_class=GLM4VForCausalLM, dtype="float32")
        assert text.config.vision_config is None
        found = flatten_params(text.params)
        assert found.keys() == {path for path in expected if "/vision/" not in path}
        assert all(np.array_equal(found[path], expected[path]) for path in found)
    for source, target in ((cases.GOLDEN, tmp_path / "text"), (tmp_path / "native", cases.GOLDEN)):
        assert convert.verify(source, target).equal


def text(length: int, config: GLM4VConfig) -> dict[str, np.ndarray]:
    """Ids of four rows, padded on the left by 0, 2, 4 and 6."""
    ids = np.random.default_rng(0).integers(0, config.padded_vocab_size, (4, length))
    mask = np.arange(length) >= 2 * np.arange(4)[:, None]
    return {"input_ids": np.where(mask, ids, config.pad_token_id), "attention_mask": mask.astype(int)}


def positions(mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask.cumsum(-1) - 1, 0)


def theirs(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """transformers' logits; it counts padding as positions unless told."""
    import torch

    tensors = {name: torch.tensor(each) for name, each in inputs.items()}
    with torch.no_grad():
        out = model(**tensors, position_ids=torch.tensor(positions(inputs["attention_mask"])))
    return out.logits.double().numpy()


def ours(model: Any, inputs: dict[str, np.ndarray], dtype: str) -> Any:
    config, params = cases.ported(model)
    model = GLM4VForConditionalGeneration(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    return cases.forward(model, params, {name: jnp.asarray(each) for name, each in inputs.items()}).logits


@pytest.mark.torch
@pytest.mark.parametrize("length, theta", [(11, 10000.0), (611, 5e6)])
def test_the_decoder_is_that_of_transformers(length: int, theta: float, x64: None) -> None:
    """From its own names and config; at length 611 the slow channels have turned, too."""
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
    reference = cases.torch_decoder("float64", rope_parameters=rope)
    inputs = text(length, cases.config())
    there = inputs["attention_mask"] != 0
    found = np.asarray(ours(reference, inputs, "float64"))
    assert_close(found[there], theirs(reference, inputs)[there], FLOAT64, "logits")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_no_worse_than_that_of_transformers(dtype: str) -> None:
    """Over 611 tokens: 0.84 of its error in float32, 0.98 in bfloat16 were measured."""
    reference = cases.torch_decoder(dtype)
    inputs = text(611, cases.config())
    there = inputs["attention_mask"] != 0
    found, expected = np.asarray(ours(reference, inputs, dtype)), theirs(reference, inputs)
    exact = theirs(cases.rounded_as_the_original(reference.double()), inputs)
    assert rms_error(found[there], exact[there]) <= BFLOAT16_RATIO * rms_error(expected[there], exact[there])
