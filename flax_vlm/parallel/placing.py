"""Arrays from files onto devices."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

WORKERS = 4


def place(
    shapes: Mapping[str, tuple[int, ...]],
    shardings: Mapping[str, Sharding],
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    dtype: Any = None,
) -> dict[str, jax.Array]:
    """Arrays in their shardings; on a mesh of many processes each reads what its own devices hold, and no more.

    Args:
      shapes: by name, in the order in which to read.
      read: a slice of a named array, of whole axes or step 1; called from several threads, once for each slice.
      dtype: cast floating arrays to it.
    """

    def one(name: str) -> jax.Array:
        pieces: dict[Any, np.ndarray] = {}

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
            key = tuple((part.start, part.stop) for part in index)
            if key not in pieces:
                array = read(name, index)
                pieces[key] = array.astype(dtype, copy=False) if dtype is not None and is_float(array) else array
            return pieces[key]

        return jax.make_array_from_callback(shapes[name], shardings[name], piece)

    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(shapes, pool.map(one, shapes), strict=True))


def is_float(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, np.floating))
