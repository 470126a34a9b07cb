"""Run by test_step.py in a process with eight CPU devices: a step on a mesh is that of one device.

B = 32 rows   D = 8 numbers in   F = 12 inside   E = 3 out
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_vlm import parallel
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.training.objective import Loss
from flax_vlm.training.optimizer import OptimizerConfig, make_optimizer
from flax_vlm.training.step import Metrics, TrainState, compiled_step, make_step, split, state_shardings
from tests.tolerances import FLOAT64, assert_close

CONFIG = OptimizerConfig(weight_decay=0.1)
FROZEN = (("lower/bias", False),)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inside = Dense(12, kernel_axes=("embed", "mlp"), param_dtype=jnp.float64, name="lower")(x)
        return Dense(3, kernel_axes=("mlp", "embed"), param_dtype=jnp.float64, name="upper")(nn.gelu(inside))


def objective(params: Any, batch: Any, rng: Any) -> Loss:
    errors = Model().apply({"params": params}, batch["x"]) - batch["y"]
    return Loss((batch["weight"] * jnp.square(errors).sum(-1)).sum(), batch["weight"].sum())


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((32, 8)), rng.standard_normal((32, 3))
    return {"x": x, "y": y, "weight": rng.integers(0, 4, 32).astype(float)}


def run(params: Any, mesh: Any = None, rules: Any = None) -> tuple[Any, TrainState, str]:
    """(loss and parameters of three steps, the last state, the compiled program)."""
    parts = split(params, FROZEN)
    optimizer = make_optimizer(CONFIG, parts[0], 9)
    step = make_step(objective, optimizer, accumulate=2, ema_decay=0.9, spike_factor=4.0)
    key = jax.random.key(0)
    state = TrainState.create(*parts, optimizer, key, dtype=jnp.float64, param_dtype=jnp.float64, ema=True)
    where = None
    if mesh is not None:
        boxed = jax.eval_shape(Model().init, key, batch(0)["x"])["params"]
        where = state_shardings(state, parallel.shardings(boxed, mesh, rules))
        state = jax.device_put(state, where)
    run_step = compiled_step(step, where)
    seen, text, before = [], "", state
    for seed in range(3):
        rows = batch(seed) if mesh is None else parallel.global_batch(mesh, rules, batch(seed))
        text = text or run_step.lower(state, rows).compile().as_text()
        before, (state, metrics) = state, run_step(state, rows)
        assert isinstance(metrics, Metrics) and metrics.skipped == 0
        seen.append(jax.tree.map(np.array, (metrics, state.params, state.ema)))  # copies: a view keeps its array
    given_on = jax.tree.leaves((before.params, before.opt_state, before.ema))
    assert all(leaf.is_deleted() for leaf in given_on), "a step leaves two states in memory"
    return seen, state, text


def main() -> None:
    assert len(jax.devices()) == 8
    with jax.enable_x64(True):
        params = nn.meta.unbox(Model().init(jax.random.key(0), batch(0)["x"])["params"])
        params = jax.device_get(params)
        expected, *_ = run(params)
        for mesh, rules in (
            (parallel.make_mesh(data=8), parallel.REPLICATED),
            (parallel.make_mesh(data=2, fsdp=4), parallel.Rules(embed="fsdp", replicate_below=0)),
        ):
            with parallel.use(mesh, rules):
                found, state, text = run(params, mesh, rules)
            jax.tree.map(lambda one, other: assert_close(one, other, FLOAT64), found, expected)
            moves = set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)[-\w]*\(", text))
            if rules == parallel.REPLICATED:
                assert moves == {"all-reduce"}, moves
                print("every row stays on its device")
            else:
                assert "all-to-all" not in moves, moves
                for tree in (state.params, state.ema, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
                    kernel = flatten_params(tree)["lower/kernel"]
                    assert kernel.sharding.shard_shape(kernel.shape) == (2, 12)
                assert state.frozen["lower"]["bias"].sharding.is_fully_replicated


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
