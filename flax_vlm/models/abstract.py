"""A model's parameters and inputs as shapes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn


def abstract_params(model: nn.Module) -> Any:
    """`jax.eval_shape(model.init, ...)["params"]` on the model's own example inputs, axis names attached.

    `flax.linen.meta.unbox` removes the names.
    """
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example_inputs()))["params"]


def blank_inputs(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of these shapes, by input name: ones where it ends in mask, else zeros. What is no shape stays as it is.

    A `jax.ShapeDtypeStruct` says its dtype; a tuple means int32 where the name ends in ids or mask, else float32.
    """

    def blank(name: str, given: Any) -> Any:
        if isinstance(given, tuple):
            given = jax.ShapeDtypeStruct(given, np.int32 if name.endswith(("ids", "mask")) else np.float32)
        if not isinstance(given, jax.ShapeDtypeStruct):
            return given
        return np.full(given.shape, name.endswith("mask"), given.dtype)

    return {name: blank(name, given) for name, given in shapes.items()}
