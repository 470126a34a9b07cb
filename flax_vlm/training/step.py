"""One step of training: gradients of what trains, over parts of the batch, an update, and when to throw it away.

The step knows no model: an objective gives (sum, weight) of a batch, and the loss is their quotient. Compute in
bfloat16 with float32 master weights is the model's `dtype` and `param_dtype`: its modules cast as they compute.

B rows of a batch   A parts of it (`accumulate`)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, tree_map_with_path
from jaxtyping import Array, Float, Int

from flax_vlm.layers.param_tree import flatten_params, is_float, unflatten_params
from flax_vlm.training.objective import Loss, Objective
from flax_vlm.training.optimizer import Optimizer
from flax_vlm.training.patterns import Patterns, first_match

Batch: TypeAlias = Mapping[str, Any]
MEMORY = 0.99  # how much of the average gradient norm stays from one step to the next
# Of the compiler. Without this one XLA's CPU code copies the optimizer's slots whole before it updates them in place.
_OPTIONS = {"cpu": {"xla_cpu_copy_insertion_use_region_analysis": True}}


class TrainState(struct.PyTreeNode):
    """All that a run goes on from. `usual_norm` is a running average of the gradient norm; 0 before the first."""

    step: Int[Array, ""]
    params: Any
    frozen: Any
    opt_state: Any
    ema: Any
    rng: Any
    skipped: Int[Array, ""]
    usual_norm: Float[Array, ""]

    @classmethod
    def create(
        cls,
        params: Any,
        frozen: Any,
        optimizer: Optimizer,
        rng: Any,
        *,
        dtype: Any,
        param_dtype: Any = jnp.float32,
        ema: bool = False,
    ) -> "TrainState":
        """The state before the first step, from the two parts that `split` makes.

        Arrays that have their dtype already are taken as they are: a compiled step, which gives its memory on, leaves
        nothing of them to the caller.

        Args:
          rng: a typed key (`jax.random.key`).
          dtype: of frozen parameters: that in which the model computes.
          param_dtype: of parameters that train, their average and the optimizer's slots.
          ema: keep an average of the parameters.
        """
        params = _cast(params, param_dtype)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=_cast(frozen, dtype),
            opt_state=optimizer.transform.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            rng=rng,
            skipped=jnp.zeros((), jnp.int32),
            usual_norm=jnp.zeros((), param_dtype),
        )


class Metrics(NamedTuple):
    """Of one step; `skipped` counts those thrown away so far."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    weight: Float[Array, ""]
    skipped: Int[Array, ""]


Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def split(params: Mapping[str, Any], trainable: Patterns[bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What trains and what is frozen, of parameters or of anything shaped like them; without patterns all trains.

    Raises:
      ValueError: for a pattern that decides nothing, or where nothing trains.
    """
    leaves = flatten_params(params)
    trains = first_match(trainable, leaves, True)
    if not any(trains.values()):
        raise ValueError("trainable: every parameter is frozen")
    both = [{path: leaf for path, leaf in leaves.items() if trains[path] == which} for which in (True, False)]
    return unflatten_params(both[0]), unflatten_params(both[1])


def merge(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`: the parameters of the whole model."""
    return unflatten_params(flatten_params(frozen) | flatten_params(params))


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    spike_factor: float | None = None,
) -> Step:
    """(state, batch) to (state, metrics), to be compiled; see `compiled_step`.

    An update is thrown away where loss or gradients are not finite, or with a gradient norm of more than `spike_factor`
    times its running average: parameters, slots and their average stay as they are, and the learning rate with them.
    The average goes on, up to that limit, so that gradients which have grown for good are let through in the end.

    Args:
      accumulate: parts that the batch is computed in, one after the other. The gradients are those of the whole batch:
        sums over its parts, divided by the weight of all. Part i takes rows i, i + A, i + 2A ..., so that each device
        keeps the rows it has. A loss that is of all rows at once, as a contrastive one, makes parts of its own.
      ema_decay: how much of the average of the parameters stays from one step to the next.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if (state.ema is None) != (ema_decay is None):
            raise ValueError(f"ema_decay is {ema_decay}, and the state was created with ema={state.ema is not None}")

        def one_part(rows: Batch, part: Any) -> tuple[Any, Loss]:
            key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), part)

            def minimised(params: Any) -> tuple[Array, Loss]:
                loss = objective(merge(params, state.frozen), rows, key)
                return (_mean(loss) if accumulate == 1 else loss.total), loss

            return jax.grad(minimised, has_aux=True)(state.params)

        if accumulate == 1:  # of the mean at once: to divide gradients is a pass over all of them
            gradients, loss = one_part(batch, 0)
        else:
            gradients, loss = _sum_over_parts(one_part, batch, accumulate)
            gradients = jax.tree.map(lambda each: each / _divisor(loss).astype(each.dtype), gradients)
        mean = _mean(loss)
        norm = optax.tree.norm(gradients).astype(state.usual_norm.dtype)

        limit = jnp.inf if spike_factor is None else spike_factor * state.usual_norm
        limit = jnp.where(state.usual_norm > 0, limit, jnp.inf)
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        accepted = finite & (norm <= limit)
        usual = MEMORY * state.usual_norm + (1 - MEMORY) * jnp.minimum(norm, limit)
        usual = jnp.where(state.usual_norm > 0, usual, norm)

        def if_accepted(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda one, other: jnp.where(accepted, one, other), new, old)

        updates, opt_state = optimizer.transform.update(gradients, state.opt_state, state.params)
        params = if_accepted(optax.apply_updates(state.params, updates), state.params)
        ema = None if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
        skipped = state.skipped + ~accepted
        rate = jnp.asarray(optimizer.schedule(state.step - state.skipped))
        metrics = Metrics(mean, norm, rate, loss.weight, skipped)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=if_accepted(opt_state, state.opt_state),
            ema=if_accepted(ema, state.ema),
            skipped=skipped,
            usual_norm=jnp.where(finite, usual, state.usual_norm),
        )
        return state, metrics

    return step


def compiled_step(step: Step, shardings: TrainState | None = None) -> Step:
    """`step` compiled, the state that goes in giving its memory to the one that comes out.

    On a CPU it has compiler options of its own, so JAX refuses to trace it inside another function (ValueError).

    Args:
      shardings: from `state_shardings`, to hold the state to them. Mesh and rules are in effect where it is called.
    """
    if shardings is None:
        platform, out_shardings = jax.default_backend(), None
    else:
        platform, out_shardings = jax.tree.leaves(shardings)[0].mesh.devices.flat[0].platform, (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings, compiler_options=_OPTIONS.get(platform))


def state_shardings(state: TrainState, shardings: Mapping[str, Any]) -> TrainState:
    """Where each array of a state (or of its shapes) goes, from the shardings of all parameters.

    The average and the optimizer's slots stand with their parameters; what has another shape, such as the rows and
    columns of Adafactor, is on every device.
    """
    placed = flatten_params(shardings)
    shapes = {path: leaf.shape for path, leaf in flatten_params(merge(state.params, state.frozen)).items()}
    everywhere = NamedSharding(next(iter(placed.values())).mesh, PartitionSpec())

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = "/".join(key.key for key in keys if isinstance(key, DictKey))
        return placed[path] if path and leaf.shape == shapes[path] else everywhere

    return tree_map_with_path(place, state)


def _divisor(loss: Loss) -> Float[Array, ""]:
    """The weight of a loss; 1 where nothing counts, as everything is 0 then."""
    return jax.lax.stop_gradient(jnp.where(loss.weight > 0, loss.weight, 1))


def _mean(loss: Loss) -> Float[Array, ""]:
    return loss.total / _divisor(loss)


def _sum_over_parts(one_part: Callable[[Batch, Any], Any], batch: Batch, parts: int) -> Any:
    """The sum of `one_part(rows, index)` over so many parts of a batch, one after the other."""
    for name, leaf in batch.items():
        if leaf.shape[0] % parts:
            raise ValueError(f"{name} has {leaf.shape[0]} rows: expected a multiple of accumulate, which is {parts}")
    rows = {name: optax.microbatching.reshape_batch_axis(leaf, leaf.shape[0] // parts) for name, leaf in batch.items()}
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(one_part, first, 0))

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, one_part(*part)), None

    return jax.lax.scan(add, zeros, (rows, jnp.arange(parts)))[0]


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if is_float(leaf.dtype) else leaf, tree)
