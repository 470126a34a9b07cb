"""How the examples are trained (AdamW, warmed up and then along a cosine, one batch a step) and exported."""

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from flax_vlm import convert
from flax_vlm.pretrained import VLM

Batch = Mapping[str, Any]
Loss = Callable[[Any, Batch, Array], Float[Array, ""]]  # of parameters, a batch, and a key for the dropout


class State(NamedTuple):
    params: Any
    optimizer: optax.OptState
    rng: Array


def initial_params(model: Any, seed: int) -> Any:
    """Random parameters, without the names of their axes."""
    example_inputs: dict[str, Any] = model.example_inputs()
    return nn.meta.unbox(model.init(jax.random.key(seed), **example_inputs)["params"])


def train(
    loss: Loss,
    params: Any,
    draw: Callable[[], Batch],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    trainable: Any = None,
) -> Any:
    """The parameters after `steps` batches from `draw`; none before them is looked at.

    `trainable` holds a boolean for each parameter; without it all of them learn.
    """
    if trainable is None:
        trainable = jax.tree.map(lambda _: True, params)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 20, steps)
    decays = jax.tree.map(lambda leaf, learns: learns and leaf.ndim > 1, params, trainable)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=weight_decay, mask=decays)
    )

    def loss_of_trainable(params: Any, batch: Batch, rng: Array) -> Float[Array, ""]:
        """What is frozen has no gradient, and none is computed."""
        stopped = jax.tree.map(lambda leaf, learns: leaf if learns else lax.stop_gradient(leaf), params, trainable)
        return loss(stopped, batch, rng)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch) -> tuple[State, Float[Array, ""]]:
        rng, dropout = jax.random.split(state.rng)
        value, gradients = jax.value_and_grad(loss_of_trainable)(state.params, batch, dropout)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state, rng), value

    # On a CPU the default generator would take as long for the dropout as the model for everything else.
    state = State(params, optimizer.init(params), jax.random.key(0, impl="rbg"))
    start, losses = time.perf_counter(), []
    for number in range(1, steps + 1):
        state, value = step(state, draw())
        losses.append(value)
        if number % 100 == 0:
            print(f"step {number:5}   loss {np.mean(losses):.4f}   {time.perf_counter() - start:4.0f} s", flush=True)
            losses.clear()
    return state.params


def export(vlm: VLM, target: Path) -> None:
    """Writes a checkpoint in PyTorch's layout, over the one that is there."""
    with tempfile.TemporaryDirectory() as folder:
        vlm.save_pretrained(Path(folder) / "native")
        convert.to_torch(Path(folder) / "native", target, overwrite=True)
    (target / "conversion.json").unlink()  # it tells of a folder that is gone
