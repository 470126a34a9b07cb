"""The step: parts of a batch, what is frozen, what is thrown away, averages, keys, dtypes, meshes.

B = 12 rows   D = 5 numbers in   F = 7 inside   E = 3 out
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_vlm import parallel
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.idefics import IdeficsForVisionText2Text, trainable
from flax_vlm.training.objective import Loss
from flax_vlm.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from flax_vlm.training.patterns import Patterns, exact
from flax_vlm.training.step import MEMORY, TrainState, compiled_step, make_step, merge, split, state_shardings
from tests.parity import idefics_cases
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[2]
# The same sums in another order, in float64. Tighter than for other layers: a term left out would be 1e-2.
SUMMED = 1e-12
LOWER_IS_FROZEN = (("lower/.*", False),)
SGD = OptimizerConfig(name="sgd", schedule="constant", learning_rate=0.1, clip_norm=None)
ADAM = OptimizerConfig(schedule="linear", learning_rate=0.01, weight_decay=0.1)


class Model(nn.Module):
    dtype: Any = None
    param_dtype: Any = jnp.float64
    drop: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        inside = nn.gelu(dense(7, name="lower")(x))
        return dense(3, name="upper")(nn.Dropout(self.drop, deterministic=not self.drop)(inside))


def squares(model: Model, params: Any, batch: Any, rng: Any) -> Loss:
    errors = model.apply({"params": params}, batch["x"], rngs={"dropout": rng}) - batch["y"]
    return Loss((batch["weight"] * jnp.square(errors).sum(-1)).sum(), batch["weight"].sum())


def batch(seed: int = 1, rows: int = 12, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((rows, 5)), scale * rng.standard_normal((rows, 3))
    return {"x": x, "y": y, "weight": rng.integers(0, 4, rows).astype(float)}


def start(
    config: OptimizerConfig = SGD,
    trains: Patterns[bool] = (),
    dtype: Any = jnp.float64,
    param_dtype: Any = jnp.float64,
    ema: bool = False,
) -> tuple[TrainState, Optimizer]:
    params = Model(param_dtype=param_dtype).init(jax.random.key(0), np.zeros((1, 5)))["params"]
    params, frozen = split(params, trains)
    optimizer = make_optimizer(config, params, 1000)
    key = jax.random.key(7)
    return TrainState.create(params, frozen, optimizer, key, dtype=dtype, param_dtype=param_dtype, ema=ema), optimizer


@cache
def compiled(config: OptimizerConfig, drop: float = 0.0, **options: Any) -> Callable[..., Any]:
    return jax.jit(make_step(partial(squares, Model(drop=drop)), start(config)[1], **options))


def numbers(tree: Any) -> Any:
    """Arrays, keys as well, as numpy's."""
    return jax.tree.map(
        lambda leaf: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf),
        tree,
    )


def identical(one: Any, other: Any) -> None:
    one, other = numbers(one), numbers(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def close(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda each, wanted: assert_close(each, wanted, SUMMED), numbers(one), numbers(other))


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_of_a_batch_are_the_batch(parts: int, x64: None) -> None:
    """Though their weights differ, and one of a single row may have none."""
    assert len(set(batch()["weight"].reshape(-1, parts).sum(0))) > 1 and not batch()["weight"].all()
    for config in (SGD, ADAM):
        state, _ = start(config)
        whole, metrics = compiled(config)(state, batch())
        assert metrics.loss > 0.1 and metrics.weight == batch()["weight"].sum()
        close(compiled(config, accumulate=parts)(state, batch()), (whole, metrics))


def test_the_loss_and_its_gradient(x64: None) -> None:
    state, _ = start()
    after, metrics = compiled(SGD, accumulate=3)(state, batch())

    def mean(params: Any) -> Any:
        loss = squares(Model(), params, batch(), state.rng)
        return loss.total / loss.weight

    loss, gradients = jax.value_and_grad(mean)(state.params)
    close(after.params, jax.tree.map(lambda param, gradient: param - 0.1 * gradient, state.params, gradients))
    close(metrics[:3], (loss, optax.tree.norm(gradients), jnp.float64(0.1)))


def test_a_batch_in_which_nothing_counts(x64: None) -> None:
    state, _ = start()
    after, metrics = compiled(SGD)(state, batch() | {"weight": np.zeros(12)})
    assert metrics.loss == metrics.gradient_norm == metrics.weight == metrics.skipped == 0
    identical(after.params, state.params)


def test_what_is_frozen_has_no_gradient_no_slots_and_never_moves(x64: None) -> None:
    @jax.custom_vjp
    def without_gradient(x: jax.Array) -> jax.Array:
        return x

    def backward(*_: Any) -> Any:
        raise AssertionError("a gradient of what is frozen")

    without_gradient.defvjp(lambda x: (x, None), backward)

    def objective(params: Any, batch: Any, rng: Any) -> Loss:
        return squares(Model(), params | {"lower": jax.tree.map(without_gradient, params["lower"])}, batch, rng)

    state, optimizer = start(ADAM, LOWER_IS_FROZEN, ema=True)
    assert set(state.params) == {"upper"} and set(state.frozen) == {"lower"}
    slots = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.shape]
    assert sorted(slots) == sorted([(7, 3), (3,)] * 2)
    after, _ = jax.jit(make_step(objective, optimizer, ema_decay=0.9, accumulate=2))(state, batch())
    identical(after.frozen, state.frozen)
    assert (after.params["upper"]["kernel"] != state.params["upper"]["kernel"]).all()
    everything, optimizer = start(ADAM)
    with pytest.raises(AssertionError, match="a gradient of what is frozen"):
        jax.eval_shape(make_step(objective, optimizer), everything, batch())
    trained, _ = compiled(ADAM)(everything, batch())
    assert (trained.params["lower"]["kernel"] != everything.params["lower"]["kernel"]).all()


def test_updates_that_are_thrown_away(x64: None) -> None:
    """Not finite, or far above what is usual: all that was learnt stays, bit for bit, and the rate with it."""
    step = compiled(ADAM, accumulate=3, ema_decay=0.9, spike_factor=4.0)
    state, _ = start(ADAM, ema=True)
    for seed in range(3):
        state, metrics = step(state, batch(seed))
    assert metrics.skipped == 0 and metrics.gradient_norm < 4 * state.usual_norm

    def learnt(state: TrainState) -> Any:
        return state.params, state.frozen, state.opt_state, state.ema, state.rng

    for place, value in (("y", np.nan), ("x", np.inf), ("y", 1e200)):
        bad = batch()
        bad[place][bad["weight"].argmax(), 0] = value
        after, metrics = step(state, bad)
        identical(learnt(after), learnt(state))
        assert (after.step, after.skipped, metrics.skipped) == (4, 1, 1) and after.usual_norm == state.usual_norm
        assert not np.isfinite(metrics.gradient_norm)

    spike, metrics = step(state, batch(scale=60))
    identical(learnt(spike), learnt(state))
    assert (spike.step, spike.skipped) == (4, 1) and 4 * state.usual_norm < metrics.gradient_norm < np.inf
    assert_close(spike.usual_norm, state.usual_norm * (MEMORY + 4 * (1 - MEMORY)), SUMMED)

    expected, wanted = step(state, batch(5))
    after, metrics = step(spike, batch(5))
    identical(learnt(after), learnt(expected))
    assert metrics.learning_rate == wanted.learning_rate < 0.01 and (after.step, after.skipped) == (5, 1)


def test_the_guard_counts_from_the_first_step_that_is_finite(x64: None) -> None:
    step = compiled(ADAM, spike_factor=4.0)
    state, _ = start(ADAM)
    state, metrics = step(state, batch() | {"y": np.full((12, 3), np.nan)})
    assert state.usual_norm == 0 and state.skipped == 1
    state, metrics = step(state, batch(scale=60))
    assert state.usual_norm == metrics.gradient_norm > 0 and state.skipped == 1


def test_gradients_that_have_grown_for_good_are_let_through_in_the_end(x64: None) -> None:
    step = compiled(ADAM, spike_factor=4.0)
    state, _ = start(ADAM)
    state, _ = step(state, batch())
    usual = state.usual_norm
    after, metrics = step(state, batch(scale=60))
    while after.skipped > state.skipped and after.step < 300:
        state = after
        after, metrics = step(state, batch(scale=60))
    needed = np.log(metrics.gradient_norm / usual / 4) / np.log(MEMORY + 4 * (1 - MEMORY))
    assert 10 < needed < 200 and state.skipped == np.ceil(needed)


def test_a_running_average_of_parameters(x64: None) -> None:
    step = compiled(ADAM, ema_decay=0.9)
    state, optimizer = start(ADAM, ema=True)
    expected = state.params
    for seed in range(3):
        state, _ = step(state, batch(seed))
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, state.params)
    close(state.ema, expected)
    for decay, ema in ((0.9, False), (None, True)):
        step = make_step(partial(squares, Model()), optimizer, ema_decay=decay)
        with pytest.raises(ValueError, match=f"ema_decay is {decay}, and the state was created with ema={ema}"):
            jax.eval_shape(step, start(ADAM, ema=ema)[0], batch())


def test_dropout_is_another_one_in_every_step_and_part_and_the_same_again(x64: None) -> None:
    step = compiled(SGD, drop=0.5)
    state, _ = start()
    loss, again = (step(state, batch())[1].loss for _ in range(2))
    later, other = (
        step(each, batch())[1].loss for each in (state.replace(step=1), state.replace(rng=jax.random.key(8)))
    )
    assert loss == again and len({float(each) for each in (loss, later, other)}) == 3
    row = {name: np.repeat(rows[:1], 6, axis=0) for name, rows in batch().items()}
    row["weight"] = np.ones(6)
    state, parts, one = start()[0], compiled(SGD, drop=0.5, accumulate=6), compiled(SGD, drop=0.5)
    single = {name: rows[:1] for name, rows in row.items()}
    assert abs(parts(state, row)[1].loss - one(state, single)[1].loss) > 1e-3  # six draws, not one six times


def test_what_trains_is_wide_and_what_computes_is_narrow() -> None:
    """Steps too small for bfloat16 add up."""
    model = Model(jnp.bfloat16, jnp.float32)
    config = replace(SGD, name="lion", learning_rate=1e-4)
    state, optimizer = start(config, LOWER_IS_FROZEN, jnp.bfloat16, jnp.float32, ema=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.frozen)} == {"bfloat16"}
    seen = set()

    def objective(params: Any, rows: Any, rng: Any) -> Loss:
        out = model.apply({"params": params}, rows["x"])
        seen.add(out.dtype.name)
        return squares(model, params, rows, rng)

    step = jax.jit(make_step(objective, optimizer, accumulate=2, ema_decay=0.9))
    rows = jax.tree.map(lambda each: each.astype(np.float32), batch())
    after = state
    for _ in range(5):
        after, metrics = step(after, rows)
    assert seen == {"bfloat16"} and metrics.loss.dtype == metrics.gradient_norm.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves((after.params, after.ema, after.opt_state))} == {
        "float32",
        "int32",
    }
    moved = np.abs(np.asarray(after.params["upper"]["kernel"] - state.params["upper"]["kernel"]))
    assert 4e-4 < moved.max() < 6e-4 and (moved > 5e-5).all()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )


def test_splitting_by_patterns(x64: None) -> None:
    params = numbers(start()[0].params)
    frozen = (("upper/bias", True), ("upper/.*", False))
    one, other = split(params, frozen)
    assert sorted(flatten_params(one)) == ["lower/bias", "lower/kernel", "upper/bias"]
    assert sorted(flatten_params(other)) == ["upper/kernel"]
    identical(merge(one, other), params)
    assert split(params, ()) == (params, {})
    with pytest.raises(ValueError, match="every parameter is frozen"):
        split(params, ((".*", False),))
    with pytest.raises(ValueError, match=r"'uper/\.\*' matches none"):
        split(params, (("uper/.*", False),))


@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "scan"])
def test_the_flags_of_idefics(stacked: bool) -> None:
    config = replace(idefics_cases.TIED, freeze_text_layers=True, freeze_vision_layers=True)
    params = nn.meta.unbox(abstract_params(IdeficsForVisionText2Text(config)))
    params = jax.eval_shape(stack_params, params) if stacked else params
    flags = flatten_params(trainable(config, params))
    trains, frozen = split(params, exact(unflatten_params(flags)))
    assert {*flatten_params(trains)} == {path for path, flag in flags.items() if flag}
    assert {*flatten_params(frozen)} == {path for path, flag in flags.items() if not flag} != set()


def test_rows_that_cannot_be_parted(x64: None) -> None:
    state, optimizer = start()
    with pytest.raises(ValueError, match="weight has 12 rows: expected a multiple of accumulate, which is 5"):
        jax.eval_shape(make_step(partial(squares, Model()), optimizer, accumulate=5), state, batch())


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_slots_stand_with_their_parameters(name: str) -> None:
    """Rows and columns that Adafactor keeps of a matrix are on every device."""
    kernel = {"layers": {"kernel": jax.ShapeDtypeStruct((3, 129, 130), "float32")}}
    optimizer = make_optimizer(replace(SGD, name=name), kernel, 9)
    create = partial(TrainState.create, optimizer=optimizer, dtype="bfloat16", ema=True)
    state = jax.eval_shape(create, kernel, {"head": jax.ShapeDtypeStruct((7,), "float32")}, rng=jax.random.key(0))
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    split_up, head = (NamedSharding(mesh, spec) for spec in (P(None, "fsdp", "tensor"), P("tensor")))
    placed = state_shardings(state, {"layers": {"kernel": split_up}, "head": head})
    assert (placed.params, placed.ema, placed.frozen) == (*[{"layers": {"kernel": split_up}}] * 2, {"head": head})
    shapes, slots = jax.tree.leaves(state.opt_state), jax.tree.leaves(placed.opt_state)
    assert [each == split_up for each in slots] == [leaf.ndim == 3 for leaf in shapes]
    assert sum(each == split_up for each in slots) == (2 if name == "adamw" else 0)
    assert all(each.spec == P() for each in slots if each != split_up) and placed.rng.spec == placed.step.spec == P()


def test_a_step_on_a_mesh() -> None:
    script = ROOT / "tests" / "training" / "step_on_eight_devices.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "every row stays on its device" in done.stdout


def test_the_slots_of_the_optimizer_are_updated_in_place() -> None:
    kernels = {f"kernel_{i}": jax.ShapeDtypeStruct((384, 384), jnp.float32) for i in range(6)}

    def objective(params: Any, batch: Any, rng: Any) -> Loss:
        x = batch["x"]
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return Loss(jnp.square(x).sum(), jnp.float32(1))

    optimizer = make_optimizer(replace(ADAM, clip_norm=None), kernels, total_steps=9)
    create = partial(TrainState.create, frozen={}, optimizer=optimizer, rng=jax.random.key(0), dtype=jnp.float32)
    shapes = jax.eval_shape(create, kernels), {"x": jax.ShapeDtypeStruct((8, 384), jnp.float32)}
    program: Any = compiled_step(make_step(objective, optimizer))
    temporaries = program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    # The gradients are one copy of all kernels, of 1.17 that were measured; copies of the slots made 2.33 of it.
    assert temporaries < 1.5 * 6 * 384 * 384 * 4
