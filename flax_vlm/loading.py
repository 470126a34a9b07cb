"""Parameters from the files of a checkpoint onto devices, while a person looks on.

Reading and placing overlap: a few parameters are under way at any time, each device's slice straight from the file.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from flax_vlm import checkpoint, memory, parallel
from flax_vlm.layers.param_tree import common_float, flatten_params, unflatten_params
from flax_vlm.layers.quantized import Quantized, quantize, summed_axis
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.progress import bar as progress_bar

logger = logging.getLogger("flax_vlm")

SHOWN_AFTER = 0.5  # seconds without a word


class Opened(NamedTuple):
    """A checkpoint that fits its model, nothing of it read yet."""

    model: Any
    abstract: Any  # parameters as shapes, axis names attached
    dtype: np.dtype  # the floating one that holds all of the checkpoint's
    shapes: Mapping[str, tuple[int, ...]]  # by path, in the order in which to read
    read: Callable[[str, tuple[slice, ...]], np.ndarray]  # one parameter, or a slice of it


def open_torch(folder: Path, config: Any, model_class: Any, architectures: Any) -> Opened:
    from flax_vlm.convert import port
    from flax_vlm.convert.torch_files import TorchFiles

    planned = port.plan(config, TorchFiles.open(folder), model_class, architectures)
    sources = {source.flax: source for source in planned.sources}
    shapes = {path: source.shape for path, source in sources.items()}

    def read(path: str, index: tuple[slice, ...]) -> np.ndarray:
        return sources[path].read(planned.files, index)

    return Opened(planned.model, planned.abstract, planned.dtype, shapes, read)


def open_native(folder: Path, config: Any, model_class: Any, architectures: Any) -> Opened:
    whole = registry.model_class(config, architectures)
    model_class = model_class or whole
    place = registry.place_in(model_class, whole)
    if place is None:
        raise ValueError(f"{folder} holds a {whole.__name__}: it has no {model_class.__name__} inside")
    files = checkpoint.open_params(folder)
    held = place.inside(files.tensors)
    model = registry.build(model_class, registry.config_for(model_class, config), held)
    abstract = abstract_params(model)
    expected = flatten_params(nn.meta.unbox(abstract))
    faults = [f"{path}: missing" for path in expected.keys() - held.keys()]
    faults += [f"{path}: not a parameter of {model_class.__name__}" for path in held.keys() - expected.keys()]
    faults += [
        f"{path}: has shape {held[path].shape}; {expected[path].shape} was expected"
        for path in expected.keys() & held.keys()
        if held[path].shape != expected[path].shape
    ]
    if faults:
        listed = "\n  ".join(sorted(faults)[:10])
        raise ValueError(
            f"{folder}: config.json and parameters do not belong together ({len(faults)} faults):\n  {listed}"
        )

    def read(path: str, index: tuple[slice, ...]) -> np.ndarray:
        return files.read(place.prefix + path, index)

    shapes = {path: leaf.shape for path, leaf in held.items()}
    return Opened(model, abstract, common_float(leaf.dtype for leaf in held.values()), shapes, read)


def load_params(
    opened: Opened, shardings: Any, *, dtype: Any, in_eight_bits: bool, hidden: bool | None, title: str
) -> dict[str, Any]:
    """The parameters in their shardings, nested.

    Args:
      dtype: cast floating ones to it; None keeps each as it is.
      in_eight_bits: kernels and token tables become `Quantized` on the device, one after the other.
      hidden, title: of the bar, as in `flax_vlm.progress`.
    """
    placed = flatten_params(shardings)
    axes = {path: summed_axis(path, shape) for path, shape in opened.shapes.items()} if in_eight_bits else {}
    finish = {path: _quantizer(axis, placed[path]) for path, axis in axes.items() if axis is not None}
    sizes = {path: math.prod(shape) * opened.dtype.itemsize for path, shape in opened.shapes.items()}
    began = time.perf_counter()
    hidden = True if jax.process_index() else hidden
    with progress_bar(title, sum(sizes.values()), hidden=hidden, delay=SHOWN_AFTER) as bar:
        leaves = parallel.place(
            opened.shapes, placed, opened.read, dtype=dtype, finish=finish, tell=lambda path: bar.update(sizes[path])
        )
        jax.block_until_ready(leaves)
        said = memory.peak()
        bar.set_postfix_str(said, refresh=False)
    seconds = time.perf_counter() - began
    logger.info("%s: %.1f GB loaded in %.1f s, %s", title, sum(sizes.values()) / 1e9, seconds, said)
    return unflatten_params(leaves)


@functools.cache
def _quantizer(axis: int, sharding: Sharding) -> Callable[[jax.Array], Quantized]:
    """Compiled once for all parameters of a shape."""
    of_scale = sharding
    if isinstance(sharding, NamedSharding):
        names = [*sharding.spec, None, None][:2]
        names[axis] = None
        of_scale = NamedSharding(sharding.mesh, PartitionSpec(*names))
    shardings: Any = Quantized(sharding, of_scale)  # type: ignore[arg-type]  # what holds for each of its arrays
    return jax.jit(partial(quantize, axis=axis), out_shardings=shardings)
