"""The optimizer against optax's own, and every field of its config."""

import inspect
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from flax_vlm.layers.stack import stack_params, unstack_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from flax_vlm.training.optimizer import NAMES, OptimizerConfig, make_optimizer
from tests.parity import idefics_cases
from tests.tolerances import FLOAT64, assert_close

PLAIN = OptimizerConfig(schedule="constant", learning_rate=0.03, clip_norm=None)
SHAPES = {
    "model": {f"layers_{i}": {"fc": {"kernel": (4, 5), "bias": (5,)}, "norm": {"scale": (4,)}} for i in range(3)},
    "head": {"kernel": (4, 2), "bias": (2,)},
    "logit_scale": (),
}


def draw(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: np.asarray(rng.standard_normal(shape)), SHAPES, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def course(transform: Any, steps: int = 3, scale: float = 1.0, stacked: bool = False) -> Any:
    """The parameters after so many steps, with gradients drawn at random."""
    drawn = [draw(0), *(jax.tree.map(lambda each: scale * each, draw(step + 1)) for step in range(steps))]

    @jax.jit
    def run(params: Any, *gradients: Any) -> Any:
        state = transform.init(params)
        for each in gradients:
            updates, state = transform.update(each, state, params)
            params = optax.apply_updates(params, updates)
        return params

    params = run(*(map(stack_params, drawn) if stacked else drawn))
    return unstack_params(params) if stacked else params


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda each, wanted: assert_close(each, wanted, FLOAT64), one, other)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_that_optimizer_of_optax(name: str, x64: None) -> None:
    factory = getattr(optax, name)
    without = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(factory).parameters else {}
    ours = make_optimizer(replace(PLAIN, name=name), draw(0), 9).transform
    same(course(ours), course(factory(PLAIN.learning_rate, **without)))


def test_fields_of_adam_and_lion(x64: None) -> None:
    config = replace(PLAIN, b1=0.7, b2=0.8, weight_decay=0.2)
    mask = jax.tree.map(lambda shape: len(shape) > 1, SHAPES, is_leaf=_is_shape)
    options = {"b1": 0.7, "b2": 0.8, "weight_decay": 0.2, "mask": mask}
    ours = make_optimizer(replace(config, eps=1e-3), draw(0), 9).transform
    same(course(ours), course(optax.adamw(0.03, eps=1e-3, **options)))
    ours = make_optimizer(replace(config, name="lion"), draw(0), 9).transform
    same(course(ours), course(optax.lion(0.03, **options)))


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_stacked_layers_take_the_same_steps(name: str, x64: None) -> None:
    """Biases and norms of a stack have two axes, and still do not decay."""
    config = replace(PLAIN, name=name, weight_decay=0.2, clip_norm=0.5, learning_rates=((".*/norm/scale", 3.0),))
    results = []
    for stacked in (False, True):
        params = jax.eval_shape(stack_params, draw(0)) if stacked else draw(0)
        results.append(course(make_optimizer(config, params, 9).transform, stacked=stacked))
    same(*results)


def test_stacked_blocks_of_idefics_decay_alike() -> None:
    """Under a scan there are `blocks/layers_0`, `blocks/layers_1` and `blocks/gated_cross_attn_layers`."""
    shapes = nn.meta.unbox(abstract_params(IdeficsForVisionText2Text(idefics_cases.PLAIN)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)

    def moved(params: Any) -> Any:
        transform = make_optimizer(replace(PLAIN, name="sgd", weight_decay=0.2), params, 9).transform
        still = jax.tree.map(np.zeros_like, params)
        return jax.jit(lambda params: transform.update(still, transform.init(params), params)[0])(params)

    loop, scan = moved(params), moved(jax.device_get(jax.jit(stack_params)(params)))
    same(unstack_params(jax.device_get(scan)), loop)
    assert all(update.any() == (update.ndim > 1) for update in jax.tree.leaves(loop))


def test_factors_of_the_learning_rate(x64: None) -> None:
    """Of gradient step and decay alike, in whatever the first pattern says."""
    config = replace(PLAIN, name="sgd", weight_decay=0.2)
    factors = (("model/layers_[01]/.*/kernel", 0.25), ("model/.*", 0.5), ("head/bias", 4.0))
    plain, scaled = (
        jax.tree.map(np.subtract, course(make_optimizer(each, draw(0), 9).transform, 1), draw(0))
        for each in (config, replace(config, learning_rates=factors))
    )
    for i, factor in enumerate((0.25, 0.25, 0.5)):
        layer, wanted = scaled["model"][f"layers_{i}"], plain["model"][f"layers_{i}"]
        same(layer["fc"]["kernel"], factor * wanted["fc"]["kernel"])
        same(
            (layer["fc"]["bias"], layer["norm"]),
            jax.tree.map(lambda x: 0.5 * x, (wanted["fc"]["bias"], wanted["norm"])),
        )
    same(scaled["head"], {"kernel": plain["head"]["kernel"], "bias": 4 * plain["head"]["bias"]})
    same(scaled["logit_scale"], plain["logit_scale"])


def test_what_decays(x64: None) -> None:
    """Without gradients, decay alone is left."""
    config = replace(PLAIN, name="sgd", weight_decay=0.2, decay=(("head/.*", False), ("logit_scale", True)))
    after = course(make_optimizer(config, draw(0), 9).transform, steps=1, scale=0)
    before = draw(0)
    for layers in before["model"].values():
        layers["fc"]["kernel"] *= 1 - 0.03 * 0.2
    before["logit_scale"] *= 1 - 0.03 * 0.2
    same(after, before)


def test_the_norm_of_all_gradients_is_clipped(x64: None) -> None:
    config = replace(PLAIN, name="sgd", clip_norm=0.1)
    clipped, free, scaled = (
        jax.tree.map(np.subtract, course(make_optimizer(each, draw(0), 9).transform, 1, scale), draw(0))
        for each, scale in ((config, 1.0), (replace(config, clip_norm=None), 1.0), (config, 1e-3))
    )
    norm = optax.tree.norm(draw(1))
    assert norm > 1
    assert_close(optax.tree.norm(clipped), 0.1 * 0.03, FLOAT64)
    same(clipped, jax.tree.map(lambda each: each * 0.1 / norm, free))
    jax.tree.map(
        lambda each, wanted: assert_close(each, 1e-3 * wanted, FLOAT64), scaled, free
    )  # short enough: as it is


def test_schedules(x64: None) -> None:
    config = replace(PLAIN, learning_rate=0.4, final_learning_rate=0.1, warmup_steps=4)
    expected = {
        "constant": [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4],
        "linear": [0, 0.1, 0.2, 0.3, 0.4, 0.35, 0.3, 0.25, 0.2],
        "cosine": [0, 0.1, 0.2, 0.3, *(0.25 + 0.15 * np.cos(np.pi * np.arange(5) / 6))],
    }
    for name, rates in expected.items():
        schedule = make_optimizer(replace(config, schedule=name), draw(0), 10).schedule
        assert_close([schedule(jnp.int32(step)) for step in range(9)], rates, FLOAT64, name)
        assert schedule(jnp.int32(10)) == (0.4 if name == "constant" else 0.1)
        assert make_optimizer(replace(config, schedule=name, warmup_steps=0), draw(0), 10).schedule(0) == 0.4


def test_the_update_follows_the_schedule(x64: None) -> None:
    config = replace(PLAIN, name="sgd", schedule="linear", warmup_steps=2)
    transform, schedule = make_optimizer(config, draw(0), 5)
    expected = draw(0)
    for step in range(4):
        rate = schedule(step)
        expected = jax.tree.map(lambda param, g, rate=rate: param - rate * g, expected, draw(step + 1))
    same(course(transform, 4), expected)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "adamv"}, "name is 'adamv': expected one of adabelief, adafactor"),
    ({"name": "lbfgs"}, "name is 'lbfgs': expected one of"),
    ({"name": "adafactor", "b1": 0.9, "b2": 0.99}, "adafactor takes no b1 and no b2: leave it None"),
    ({"schedule": "cosin"}, "schedule is 'cosin': expected one of cosine, linear, constant"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0: expected more than 0"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1: expected 0 or more"),
    ({"clip_norm": 0.0}, "clip_norm is 0.0: expected more than 0, or None"),
    ({"learning_rates": (("head/.*", 0.0),)}, "learning_rates: 'head/.*' has 0.0: expected more than 0"),
    ({"warmup_steps": 9}, "warmup_steps is 9: expected 0 to 8, of 9 steps"),
    ({"warmup_steps": -1}, "warmup_steps is -1"),
    ({"learning_rates": (("hed/.*", 2.0),)}, "learning_rates: 'hed/.*' matches none of the 12 paths"),
    ({"decay": (("model/blocks/.*", True),)}, "decay: 'model/blocks/.*' matches none"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[message for _, message in WRONG])
def test_fields_that_are_wrong_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(replace(PLAIN, **changes), jax.eval_shape(lambda: draw(0)), 9)
