"""What current transformers no longer has, against arrays from transformers 4.40.2 (see tests/golden/README.md)."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import checkpoint, convert
from flax_vlm.convert import port
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.altclip import AltRobertaModel, prune_heads
from flax_vlm.models.registry import read_config
from tests.tolerances import FLOAT32, FLOAT64, assert_close, assert_gradients_close

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = [
    "altroberta_decoder_absolute",
    "altroberta_encoder_relative_key",
    "altroberta_head_mask_2d",
    "altroberta_pruned",
]
DTYPES = {"f64": (jnp.float64, FLOAT64), "f32": (jnp.float32, FLOAT32)}


@partial(jax.jit, static_argnums=(0, 3))
def forward(model: AltRobertaModel, params: Any, arrays: dict[str, Any], flags: tuple[tuple[str, bool], ...]) -> Any:
    return model.apply({"params": params}, **arrays, **dict(flags))


class Golden:
    """One folder: the model with its parameters, and the arrays."""

    def __init__(self, case: str, precision: str) -> None:
        self.dtype, self.tolerance = DTYPES[precision]
        planned = port.open_checkpoint(GOLDEN / case / f"ckpt_{precision}")
        self.config = planned.config
        self.model = planned.model.clone(dtype=self.dtype, param_dtype=self.dtype)
        state = {source.torch: planned.files.read(source.torch) for source in planned.sources}
        self.params = jax.tree.map(jnp.asarray, convert.from_state_dict(self.config, state, AltRobertaModel))
        self.arrays = dict(np.load(GOLDEN / case / f"{precision}.npz"))
        self.inputs = {
            name.removeprefix("in/"): jnp.asarray(value)
            for name, value in self.arrays.items()
            if name.startswith("in/") and name != "in/grad_weight"
        }
        for name in ("encoder_hidden_states", "head_mask"):
            if name in self.inputs:
                self.inputs[name] = self.inputs[name].astype(self.dtype)

    def apply(self, params: Any = None, model: Any = None, **changes: Any) -> Any:
        """The forward pass on the folder's inputs with some of them changed (or, None, left out); jitted."""
        inputs = {key: value for key, value in (self.inputs | changes).items() if value is not None}
        flags = {key: value for key, value in inputs.items() if isinstance(value, bool)}
        arrays = {key: value for key, value in inputs.items() if key not in flags}
        return forward(model or self.model, self.params if params is None else params, arrays, tuple(flags.items()))

    def sequence(self, name: str) -> list[np.ndarray]:
        count = sum(key.startswith(f"out/{name}/") for key in self.arrays)
        return [self.arrays[f"out/{name}/{i}"] for i in range(count)]


@pytest.fixture(params=DTYPES)
def precision(request: Any) -> Any:
    with jax.enable_x64(request.param == "f64"):
        yield request.param


@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str, precision: str) -> None:
    golden = Golden(case, precision)
    out = golden.apply(output_hidden_states=True, output_attentions=True)
    assert_close(out.last_hidden_state, golden.arrays["out/last_hidden_state"], golden.tolerance, "last_hidden_state")
    assert_close(out.pooler_output, golden.arrays["out/pooler_output"], golden.tolerance, "pooler_output")
    for name in ("hidden_states", "attentions", "cross_attentions"):
        expected = golden.sequence(name)
        if expected:
            assert len(getattr(out, name)) == len(expected)
        for i, (ours, theirs) in enumerate(zip(getattr(out, name) or (), expected, strict=True)):
            assert_close(ours, theirs, golden.tolerance, f"{name}[{i}]")


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, x64: None) -> None:
    golden = Golden(case, "f64")
    weight = jnp.asarray(golden.arrays["in/grad_weight"], jnp.float64)
    inputs = golden.inputs

    def loss(params: Any) -> Any:
        return (golden.model.apply({"params": params}, **inputs).last_hidden_state * weight).sum()

    gradients = convert.state_dict(golden.config, jax.jit(jax.grad(loss))(golden.params), AltRobertaModel)
    expected = {name.removeprefix("grad/"): g for name, g in golden.arrays.items() if name.startswith("grad/")}
    assert_gradients_close({name: gradients[name] for name in expected}, expected)
    for name in gradients.keys() - expected.keys():  # parameters that the output does not depend on
        assert not gradients[name].any(), name


def test_decoding_on_a_cache(precision: str) -> None:
    golden = Golden("altroberta_decoder_absolute", precision)
    cross = {name: golden.inputs[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    none = dict.fromkeys(cross)

    def columns(start: int, stop: int) -> dict[str, Any]:
        return {n: golden.inputs[n][:, start:stop] for n in ("input_ids", "attention_mask", "token_type_ids")}

    prefill = golden.apply(**columns(0, 6), **cross, cache=golden.model.init_cache(3, 9))
    assert_close(
        prefill.last_hidden_state, golden.arrays["cache/prefill_last_hidden_state"], golden.tolerance, "prefill"
    )
    two = golden.apply(**columns(6, 8), **none, cache=prefill.cache)
    assert_close(two.last_hidden_state, golden.arrays["cache/chunk2"], golden.tolerance, "two tokens at once")
    cache = prefill.cache
    for step in range(3):
        out = golden.apply(**columns(6 + step, 7 + step), **none, cache=cache)
        assert_close(out.last_hidden_state, golden.arrays[f"cache/step/{step}"], golden.tolerance, f"step {step}")
        cache = out.cache
    for layer, (own, other) in enumerate(zip(cache.layers, cache.cross, strict=True)):
        past = [golden.arrays[f"out/past/{layer}/{i}"].swapaxes(1, 2) for i in range(4)]
        for ours, theirs in zip((own.key, own.value, other.key, other.value), past, strict=True):
            assert_close(ours, theirs, golden.tolerance, f"cache of layer {layer}")
    with pytest.raises(ValueError, match="9 slots, 9 of them used: 1 new tokens do not fit"):
        golden.model.apply({"params": golden.params}, **columns(0, 1), cache=cache)


def test_scanned_layers_decode_too(x64: None) -> None:
    """Cache, cross-attention, head mask, attentions and hidden states, all through a scan."""
    golden = Golden("altroberta_decoder_absolute", "f64")
    scanned = {"model": golden.model.clone(scan_layers=True, remat="full"), "params": stack_params(golden.params)}
    half = {n: golden.inputs[n][:, :6] for n in ("input_ids", "attention_mask", "token_type_ids")}
    rest = {n: golden.inputs[n][:, 6:] for n in half} | {"encoder_hidden_states": None, "encoder_attention_mask": None}
    flags = {"output_hidden_states": True, "output_attentions": True, "head_mask": jnp.asarray(np.eye(3) + 0.5)}
    outputs = []
    for how in ({}, scanned):
        first = golden.apply(**how, **half, **flags, cache=golden.model.init_cache(3, 9))
        outputs.append((first, golden.apply(**how, **rest, **flags, cache=first.cache)))
    assert jax.tree.structure(outputs[0]) == jax.tree.structure(outputs[1])
    jax.tree.map(lambda one, other: assert_close(one, other, FLOAT64), *outputs)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_relative_positions_on_a_cache(kind: str, chunk: int, x64: None) -> None:
    """Any chunking equals the whole text at once. transformers 4.40.2 places every query of a chunk at its end."""
    golden = Golden("altroberta_encoder_relative_key", "f64")
    config = golden.config.__class__(**{**vars(golden.config), "position_embedding_type": kind, "is_decoder": True})
    model = golden.model.clone(config=config)
    whole = golden.apply(model=model).last_hidden_state
    cache = model.init_cache(3, 12)
    parts = []
    for start in range(0, 9, chunk):
        columns = {name: value[:, start : start + chunk] for name, value in golden.inputs.items()}
        out = golden.apply(model=model, **columns, cache=cache)
        parts.append(out.last_hidden_state)
        cache = out.cache
    assert_close(np.concatenate(parts, axis=1), whole, FLOAT64, f"chunks of {chunk}")


def test_relative_key_query_by_its_formula(x64: None) -> None:
    """One head written out: scores + q.E[l - r] + k.E[l - r], all over sqrt(H)."""
    golden = Golden("altroberta_encoder_relative_key", "f64")
    config = golden.config.__class__(**{**vars(golden.config), "position_embedding_type": "relative_key_query"})
    out = golden.apply(model=golden.model.clone(config=config), output_attentions=True, output_hidden_states=True)
    states = np.asarray(out.hidden_states[0][0])
    layer = jax.tree.map(np.asarray, golden.params["encoder"]["layers_0"]["attention"]["self"])
    head = slice(8, 16)
    query, key = (states @ layer[n]["kernel"][:, head] + layer[n]["bias"][head] for n in ("query", "key"))
    scores = np.empty((9, 9))
    for left in range(9):
        for right in range(9):
            distance = layer["distance_embedding"]["embedding"][left - right + config.max_position_embeddings - 1]
            scores[left, right] = query[left] @ key[right] + query[left] @ distance + key[right] @ distance
    weights = np.exp(scores / 8**0.5)
    assert_close(out.attentions[0][0, 1], weights / weights.sum(-1, keepdims=True), FLOAT64, "weights of head 1")


def test_one_row_of_head_mask_serves_all_layers(x64: None) -> None:
    golden = Golden("altroberta_head_mask_2d", "f64")
    row = jnp.asarray([1.0, 0.0, 0.5])
    one = golden.apply(head_mask=row).last_hidden_state
    three = golden.apply(head_mask=jnp.broadcast_to(row, (3, 3))).last_hidden_state
    assert_close(one, three, 0.0)
    assert np.abs(one - golden.apply(head_mask=None).last_hidden_state).max() > 1e-3


def test_pruning_is_masking(x64: None) -> None:
    golden = Golden("altroberta_head_mask_2d", "f64")
    mask = np.ones((3, 3))
    mask[0, 1] = mask[2, 0] = mask[2, 2] = mask[1] = 0
    masked = golden.apply(head_mask=jnp.asarray(mask)).last_hidden_state
    config, params = prune_heads(golden.config, golden.params, {0: [1], 2: [0]})
    config, params = prune_heads(config, params, {2: [2, 0], 1: [0, 1, 2]})  # 0 of layer 2 is gone already
    assert config.pruned_heads == ((0, (1,)), (1, (0, 1, 2)), (2, (0, 2)))
    pruned = golden.apply(params, golden.model.clone(config=config), head_mask=None)
    assert_close(pruned.last_hidden_state, masked, FLOAT64)
    with pytest.raises(ValueError, match="layer 3"):
        prune_heads(config, params, {3: [0]})


def test_a_pruned_checkpoint_converts_and_returns(tmp_path: Path) -> None:
    source = GOLDEN / "altroberta_pruned" / "ckpt_f32"
    convert.to_flax(source, tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["pruned_heads"] == {"0": [1], "2": [0, 2]}
    before, after = (port.open_checkpoint(folder) for folder in (source, tmp_path / "back"))
    assert before.files.tensors.keys() == after.files.tensors.keys()
    for name in before.files.tensors:
        np.testing.assert_array_equal(before.files.read(name), after.files.read(name))
    assert checkpoint.read_config(tmp_path / "native")["architectures"] == ["AltRobertaModel"]


def test_arguments_that_the_config_does_not_provide_for(x64: None) -> None:
    golden = Golden("altroberta_head_mask_2d", "f64")
    states = jnp.zeros((3, 5, 24))
    with pytest.raises(ValueError, match="is_decoder=True and add_cross_attention=True"):
        golden.apply(encoder_hidden_states=states)
    with pytest.raises(ValueError, match="only a decoder has a cache"):
        golden.model.init_cache(3, 9)
    with pytest.raises(ValueError, match=r"head_mask has shape \(4,\): expected \(3,\) or \(3, 3\)"):
        golden.apply(head_mask=jnp.ones(4))
    with pytest.raises(ValueError, match="39 tokens: the model has positions for 38"):
        Golden("altroberta_decoder_absolute", "f64").model.init_cache(3, 39)
    pruned = Golden("altroberta_pruned", "f64")
    with pytest.raises(ValueError, match="some are pruned"):
        pruned.apply(head_mask=jnp.ones(3))


def test_chunked_feed_forward_is_accepted() -> None:
    """It saves memory in torch and changes no number; XLA plans its memory itself."""
    data = json.loads((GOLDEN / "altroberta_pruned" / "ckpt_f32" / "config.json").read_text())
    assert read_config(data | {"chunk_size_feed_forward": 4}) == read_config(data)
