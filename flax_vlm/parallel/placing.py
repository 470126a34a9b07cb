"""Arrays from files onto devices."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from flax_vlm.array_files import empty

WORKERS = 4


def place(
    shapes: Mapping[str, tuple[int, ...]],
    shardings: Mapping[str, Sharding],
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    dtype: Any = None,
    finish: Mapping[str, Callable[[jax.Array], Any]] = {},
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Arrays in their shardings; on a mesh of many processes each reads what its own devices hold, and no more.

    Args:
      shapes: by name, in the order in which to read.
      read: a slice of a named array, of whole axes or step 1; called from several threads, once for each slice.
      dtype: cast floating arrays to it, but for those in `finish`.
      finish: what takes the place of an array, made of it as it is in the file.
      tell: called with the name of each array that is there, in their order.
    """

    def one(name: str) -> Any:
        pieces: dict[Any, np.ndarray] = {}
        to = None if name in finish else dtype

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
            key = tuple((part.start, part.stop) for part in index)
            if key not in pieces:
                pieces[key] = _cast(read(name, index), to)
            return pieces[key]

        array = jax.make_array_from_callback(shapes[name], shardings[name], piece)
        return finish[name](array) if name in finish else array

    placed = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, array in zip(shapes, pool.map(one, shapes), strict=True):
            placed[name] = array
            tell(name)
    return placed


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    if dtype is None or array.dtype == dtype or not is_float(array):
        return array
    if not array.flags.c_contiguous:
        return array.astype(dtype)  # as it lies: XLA transposes faster
    out = empty(array.shape, np.dtype(dtype))
    out[...] = array
    return out


def is_float(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, np.floating))
