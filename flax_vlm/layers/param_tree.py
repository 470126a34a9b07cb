"""Parameters as a flat table: {"encoder/layers_0/mlp/fc1/kernel": leaf}."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def flatten_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries to path -> leaf, paths joined by "/"."""
    return dict(flatten_dict(params, sep="/"))


def unflatten_params(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_params`."""
    return unflatten_dict(dict(leaves), sep="/")


def is_float(dtype: Any) -> bool:
    """Whether `dtype` is a floating one, bfloat16 included."""
    return bool(jnp.issubdtype(dtype, np.floating))


def common_float(dtypes: Iterable[Any]) -> np.dtype:
    """The floating dtype that holds all floating ones among `dtypes`, whether JAX has float64 on or not."""
    found = {np.dtype(dtype) for dtype in dtypes if is_float(dtype)}
    widest = max((dtype.itemsize for dtype in found), default=4)
    candidates = {dtype for dtype in found if dtype.itemsize == widest}
    return candidates.pop() if len(candidates) == 1 else np.dtype(np.float32)  # float16 and bfloat16 meet in float32
