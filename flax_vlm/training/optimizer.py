"""From a few plain fields to an optax optimizer.

    updates = -schedule(step) * factor * (direction(clipped gradients) + weight_decay * parameters)

The direction is that of any optimizer of optax whose learning rate is a plain factor. Weight decay stands outside of it
for all of them (arXiv:1711.05101), so that "adam" here is "adamw".
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.training.patterns import first_match

NAMES = (
    *("adabelief", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "lamb", "lars"),
    *("lion", "nadam", "nadamw", "novograd", "radam", "rmsprop", "sgd", "signum", "yogi"),
)


@dataclass(frozen=True)
class OptimizerConfig:
    """Patterns see the paths of the parameters that train; see `training.patterns`."""

    name: str = "adamw"
    learning_rate: float = 1e-4
    """Where warm-up ends."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    """Steps from zero to `learning_rate`, in a straight line."""
    final_learning_rate: float = 0.0
    """Where "cosine" and "linear" end."""
    b1: float | None = None
    """None leaves it to optax, as for `b2` and `eps`."""
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    """The largest norm of all gradients together; None lets any pass."""
    learning_rates: tuple[tuple[str, float], ...] = ()
    """Factors of the learning rate, by pattern; 1 elsewhere."""
    decay: tuple[tuple[str, bool], ...] = ()
    """Whether weights decay, by pattern; elsewhere those of two axes and more do (of one layer, if stacked)."""


class Optimizer(NamedTuple):
    """`schedule` is the learning rate by the number of updates made."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def make_optimizer(config: OptimizerConfig, params: Any, total_steps: int) -> Optimizer:
    """
    Args:
      params: those that train, or their shapes.

    Raises:
      ValueError: naming the field that is wrong.
    """
    schedule = make_schedule(config, total_steps)
    if config.weight_decay < 0:
        raise ValueError(f"weight_decay is {config.weight_decay}: expected 0 or more")
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise ValueError(f"clip_norm is {config.clip_norm}: expected more than 0, or None for no limit")
    for pattern, factor in config.learning_rates:
        if factor <= 0:
            raise ValueError(
                f"learning_rates: {pattern!r} has {factor}: expected more than 0; what is not trained has none"
            )
    leaves = flatten_params(params)
    factors = _by_pattern("learning_rates", config.learning_rates, leaves)
    decays = _by_pattern("decay", config.decay, leaves)
    factors = unflatten_params({path: 1.0 if factor is None else factor for path, factor in factors.items()})
    decays = unflatten_params(
        {path: _rank(path, leaf) > 1 if decays[path] is None else decays[path] for path, leaf in leaves.items()}
    )

    def add_decay(updates: Any, params: Any) -> Any:
        def one(update: jax.Array, param: jax.Array, decays: bool) -> jax.Array:
            return update - config.weight_decay * param if decays else update

        return jax.tree.map(one, updates, params, decays)

    def scale_by_factor(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda update, factor: update if factor == 1 else factor * update, updates, factors)

    parts = [_direction(config), optax.scale_by_schedule(schedule), optax.stateless(scale_by_factor)]
    if config.weight_decay:
        parts.insert(1, optax.stateless(add_decay))
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return Optimizer(optax.chain(*parts), schedule)


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate by the number of updates made; it is over after `total_steps`.

    Raises:
      ValueError: naming the field that is wrong.
    """
    peak, last, steps = config.learning_rate, config.final_learning_rate, total_steps - config.warmup_steps
    if peak <= 0:
        raise ValueError(f"learning_rate is {peak}: expected more than 0")
    if config.warmup_steps < 0 or steps <= 0:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps}: expected 0 to {total_steps - 1}, of {total_steps} steps"
        )
    shapes = {
        "cosine": optax.cosine_decay_schedule(peak, steps, alpha=last / peak),
        "linear": optax.linear_schedule(peak, last, steps),
        "constant": optax.constant_schedule(peak),
    }
    if config.schedule not in shapes:
        raise ValueError(f"schedule is {config.schedule!r}: expected one of {', '.join(shapes)}")
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    joined = optax.join_schedules([warmup, shapes[config.schedule]], [config.warmup_steps])
    return lambda updates: joined(jnp.asarray(updates, float))  # in float64 where that is on: an int32 gives float32


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's optimizer at learning rate 1, without weight decay of its own."""
    if config.name not in NAMES:
        raise ValueError(f"name is {config.name!r}: expected one of {', '.join(NAMES)}")
    factory = getattr(optax, config.name)
    takes = inspect.signature(factory).parameters
    given = {field: getattr(config, field) for field in ("b1", "b2", "eps") if getattr(config, field) is not None}
    if unknown := given.keys() - takes.keys():
        raise ValueError(f"{config.name} takes no {' and no '.join(sorted(unknown))}: leave it None")
    if "weight_decay" in takes:
        given["weight_decay"] = 0.0
    return factory(1.0, **given)


def _by_pattern(field: str, patterns: Any, paths: Any) -> dict[str, Any]:
    try:
        return first_match(patterns, paths, None)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _rank(path: str, leaf: Any) -> int:
    """Of the parameter of one layer: layers stacked for a scan (see `layers.stack`) have an axis in front."""
    stacked = any(part == "blocks" or part.endswith("layers") for part in path.split("/"))
    return leaf.ndim - stacked
