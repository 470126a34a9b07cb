"""The parameters of a model as shapes, without making any."""

from typing import Any

import jax
from flax import linen as nn


def abstract_params(model: nn.Module) -> Any:
    """`jax.eval_shape(model.init, ...)["params"]` on the model's own example inputs, axis names attached.

    `flax.linen.meta.unbox` removes the names.
    """
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example_inputs()))["params"]
