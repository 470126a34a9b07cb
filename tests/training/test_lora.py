"""Adapters: what they add, where they sit, and that nothing else learns."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm import convert
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.layers.stack import stack_params, unstack_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPModel
from flax_vlm.models.glm4v import GLM4VForCausalLM, GLM4VForConditionalGeneration
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from flax_vlm.training import lora
from flax_vlm.training.lora import LoraConfig
from tests.parity import altclip_cases, glm4v_cases, idefics_cases
from tests.tolerances import FLOAT64, assert_close

# Every kernel of every layer, and the adapter of GLM-4V, all of it called as a Dense.
CONFIG = LoraConfig(rank=4, alpha=6.0, targets=r".*(layers|blocks|linear_proj).*/kernel")
EXACT = 1e-12  # one product of float64 more


def deep(*trees: Any) -> Any:
    """Trees that have no leaf in common as one."""
    return unflatten_params({path: leaf for tree in trees for path, leaf in flatten_params(tree).items()})


def noise(tree: Any, scale: float = 0.2) -> Any:
    """Numbers like those that are learnt, for a tree of arrays or shapes."""
    rng = np.random.default_rng(2)
    draw = {path: scale * rng.standard_normal(leaf.shape) for path, leaf in flatten_params(tree).items()}
    return unflatten_params({path: jnp.asarray(leaf, jnp.float64) for path, leaf in draw.items()})


def altclip() -> tuple[Any, Any]:
    inputs = altclip_cases.to_jax(altclip_cases.texts(length=5) | {"pixel_values": altclip_cases.images()}, "float64")
    return AltCLIPModel(altclip_cases.WHOLE, dtype=jnp.float64, param_dtype=jnp.float64), inputs


def idefics() -> tuple[Any, Any]:
    config = idefics_cases.PLAIN
    inputs = idefics_cases.to_jax(idefics_cases.inputs(7, config=config), "float64")
    return IdeficsForVisionText2Text(config, dtype=jnp.float64, param_dtype=jnp.float64), inputs


def glm4v() -> tuple[Any, Any]:
    model: Any = GLM4VForConditionalGeneration(glm4v_cases.config(), dtype=jnp.float64, param_dtype=jnp.float64)
    return model, glm4v_cases.inputs("img")


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {"altclip": altclip, "idefics": idefics, "glm4v": glm4v}


@cache
def made(family: str) -> tuple[Any, Any, Any, Any]:
    """Model, parameters, inputs, and what the model makes of them."""
    with jax.enable_x64(True):
        model, inputs = FAMILIES[family]()
        return model, noise(nn.meta.unbox(abstract_params(model))), inputs, jax.jit(outcome(model))


@cache
def with_adapters(family: str) -> Any:
    return jax.jit(outcome(lora.adapted(made(family)[0], CONFIG)))


def outcome(model: Any) -> Any:
    def outcome(params: Any, inputs: Any) -> Any:
        output = model.apply({"params": params}, **inputs)
        return output.logits_per_image if isinstance(model, AltCLIPModel) else output.logits

    return outcome


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_a_sum_of_kernels(family: str, x64: None) -> None:
    _, params, inputs, plain = made(family)
    untrained = lora.init(CONFIG, params, jax.random.key(0))
    before = plain(params, inputs)
    np.testing.assert_array_equal(with_adapters(family)(deep(params, untrained), inputs), before)

    adapters = noise(untrained)
    after = plain(lora.merged(params, adapters, CONFIG), inputs)
    assert_close(with_adapters(family)(deep(params, adapters), inputs), after, EXACT, "loop")
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(before, after, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_learns_in_a_scan(family: str, x64: None) -> None:
    model, params, inputs, plain = made(family)
    untrained = lora.init(CONFIG, params, jax.random.key(0))
    scanned = outcome(lora.adapted(model.clone(scan_layers=True, remat="full"), CONFIG))

    @jax.jit
    def gradients(adapters: Any) -> Any:
        def loss(adapters: Any) -> Any:
            found = scanned(deep(stack_params(params), adapters), inputs)
            return jnp.square(found).sum(), found

        return jax.grad(loss, has_aux=True)(adapters)

    adapters = noise(untrained)
    _, found = gradients(stack_params(adapters))
    assert_close(found, plain(lora.merged(params, adapters, CONFIG), inputs), EXACT, "scan")

    by_path = flatten_params(unstack_params(gradients(stack_params(untrained))[0]))
    assert by_path.keys() == flatten_params(untrained).keys()
    assert len(by_path) > 2 * 20
    for path, gradient in by_path.items():
        # The derivative of a product by one factor is zero while the other is.
        assert jnp.any(gradient != 0) == path.endswith("lora_b"), path


def test_the_sum_of_the_kernels_is_never_formed() -> None:
    """Memory of the gradients by the adapters is far below that of the kernels they adapt."""
    sizes = replace(glm4v_cases.config(), vision_config=None, hidden_size=192, ffn_hidden_size=512, num_layers=6)
    model = GLM4VForCausalLM(sizes, scan_layers=True, remat="full")
    params = nn.meta.unbox(abstract_params(model))
    adapters = jax.eval_shape(partial(lora.init, CONFIG), params, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    adapted = lora.adapted(model, CONFIG)

    def memory(loss: Callable[[Any, Any, Any], Any]) -> int:
        compiled = jax.jit(jax.grad(loss)).lower(adapters, params, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    of_kernels = 4 * sum(leaf.size for leaf in jax.tree.leaves(params["transformer"]["encoder"]["layers"]))
    factored = memory(lambda factors, rest, ids: adapted.apply({"params": deep(factors, rest)}, ids, labels=ids).loss)
    summed = memory(
        lambda factors, rest, ids: model.apply({"params": lora.merged(rest, factors, CONFIG)}, ids, labels=ids).loss
    )
    assert factored < of_kernels / 2
    assert summed > of_kernels


def test_shapes_names_and_counts(x64: None) -> None:
    model = made("idefics")[0].clone(scan_layers=True)
    adapters = jax.eval_shape(lambda: lora.init(LoraConfig(rank=3), abstract_of(model), jax.random.key(0)))
    leaves = flatten_params(adapters)
    blocks = {path: leaf for path, leaf in leaves.items() if "/blocks/" in path}
    assert len(leaves) == 2 * 8  # q and v: of the tower, the gated layers, and both layers of a block
    assert len(blocks) == 2 * 6
    a, b = (blocks[f"model/blocks/gated_cross_attn_layers/cross_attn/v_proj/lora_{each}"] for each in "ab")
    assert (a.names, a.value.shape) == (("layers", "embed", None), (2, 20, 3))
    assert (b.names, b.value.shape) == (("layers", None, "heads"), (2, 3, 36))
    assert a.value.dtype == jnp.float64


def abstract_of(model: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(model))


def test_adapters_of_a_scan_are_those_of_its_layers(x64: None) -> None:
    shapes = {f"encoder/layers_{i}/q_proj/kernel": jnp.zeros((5, 7)) for i in range(3)}
    params = noise(unflatten_params(shapes))
    config = LoraConfig(rank=2)
    adapters = noise(lora.init(config, stack_params(params), jax.random.key(0)))
    apart = unstack_params(adapters)
    assert jax.tree.map(jnp.shape, apart) == jax.tree.map(jnp.shape, lora.init(config, params, jax.random.key(0)))
    found = unstack_params(lora.merged(stack_params(params), adapters, config))
    for path, leaf in flatten_params(lora.merged(params, apart, config)).items():
        np.testing.assert_allclose(flatten_params(found)[path], leaf, rtol=1e-14, err_msg=path)
    with pytest.raises(ValueError, match=r"expected a kernel of shape .* beside it, found none\. Are the layers"):
        lora.merged(params, adapters, config)


def test_kernels_keep_their_dtype_and_adapters_are_wide() -> None:
    params = {"layers_0": {"q_proj": {"kernel": jnp.ones((5, 7), jnp.bfloat16)}, "norm": {"scale": jnp.ones(5)}}}
    adapters = lora.init(LoraConfig(rank=2), params, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {"float32"}
    assert jnp.abs(adapters["layers_0"]["q_proj"]["lora_a"]).max() <= 5**-0.5
    assert lora.merged(params, adapters, LoraConfig(rank=2))["layers_0"]["q_proj"]["kernel"].dtype == jnp.bfloat16


class Features(nn.Module):
    """A model with a method of another name than __call__."""

    def setup(self) -> None:
        self.q_proj = Dense(7, dtype=jnp.bfloat16)

    def features(self, inputs: Any) -> Any:
        return self.q_proj(inputs)


def test_methods_and_single_rows_have_adapters_too() -> None:
    """Interception of lax.dot_general misses these: the first of itself, the second because it is in a branch."""
    rng = np.random.default_rng(0)  # all numbers are whole and small, so that bfloat16 makes no error
    config = LoraConfig(rank=2, alpha=4.0, targets="q_proj/kernel")
    shapes = {"kernel": (5, 7), "bias": (7,), "lora_a": (5, 2), "lora_b": (2, 7)}
    leaves = {name: jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) for name, shape in shapes.items()}
    params = {"q_proj": {name: leaves[name] for name in ("kernel", "bias")}}
    adapters = {"q_proj": {name: leaves[name] for name in ("lora_a", "lora_b")}}
    for rows in (1, 3):
        inputs = jnp.asarray(rng.integers(-3, 4, (rows, 5)), jnp.bfloat16)
        expected = Features().apply({"params": lora.merged(params, adapters, config)}, inputs, method="features")
        model = lora.adapted(Features(), config)
        found = jax.jit(partial(model.apply, method="features"))({"params": deep(params, adapters)}, inputs)
        np.testing.assert_array_equal(found, expected)
        assert jnp.any(found != Features().apply({"params": params}, inputs, method="features"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj/kernel", r"matches none of \d+ kernels: expected a regular expression for a whole path such as"),
        (".*/kernel", "no convolutions and no head over the vocabulary. Write a narrower one"),
        ("lm_head/kernel", r"matches lm_head/kernel: expected kernels of products with a matrix"),
        (r".*/patch_embedding/kernel", "matches model/vision_model/embeddings/patch_embedding/kernel"),
    ],
)
def test_targets_that_cannot_be(targets: str, message: str) -> None:
    _, params, _, _ = made("idefics")
    with pytest.raises(ValueError, match=message):
        lora.init(LoraConfig(targets=targets), params, jax.random.key(0))


def test_configs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"lora\.rank: expected 1 or more, came 0"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match=r"lora\.targets: expected a regular expression, came '\('"):
        LoraConfig(targets="(")


def test_a_compiled_model_is_not_taken_for_its_adapted_one() -> None:
    model = made("idefics")[0]
    adapted = lora.adapted(model, CONFIG)
    assert adapted != model
    assert adapted == lora.adapted(model, CONFIG)
    assert adapted != lora.adapted(model, LoraConfig(rank=4, alpha=12.0))
    assert (type(adapted).__name__, adapted.config) == (type(model).__name__, model.config)


@pytest.mark.torch
def test_what_is_exported_is_what_was_trained(x64: None) -> None:
    import torch

    config = idefics_cases.PLAIN
    original = idefics_cases.torch_model(config, "float64")
    params = idefics_cases.ported(config, original)
    _, _, inputs, _ = made("idefics")
    adapters = noise(lora.init(CONFIG, params, jax.random.key(0)))
    ours = with_adapters("idefics")(deep(params, adapters), inputs)

    state = convert.state_dict(config, lora.merged(params, adapters, CONFIG))
    original.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in state.items()}, strict=False)
    with torch.no_grad():
        theirs = original(**idefics_cases.to_torch({k: np.asarray(v) for k, v in inputs.items()}, "float64")).logits
    assert_close(ours, theirs.numpy(), FLOAT64, "logits")
