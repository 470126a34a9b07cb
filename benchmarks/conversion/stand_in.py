"""Rows for the checkpoint of a family that has no table yet: what they will cost, not what the parameters are called.

As in the real tables, kernels of linear layers and convolutions are transposed, everything else stays as it lies.
"""

import re
from collections.abc import Mapping

from flax_vlm.convert.rules import Axes, Source, Target, conv, identity, linear
from flax_vlm.convert.torch_files import TensorInfo


def sources(tensors: Mapping[str, TensorInfo]) -> list[Source]:
    """Where each parameter is read."""
    found = []
    for name, info in tensors.items():
        path, transform = _row(name, len(info.shape))
        found.append(Source(path, transform.flax_shape(info.shape), name, info, None, transform))
    return found


def targets(tensors: Mapping[str, TensorInfo]) -> list[Target]:
    """The tensors, each written from its parameter."""
    return [Target(source.torch, source.info.shape, (source.flax,), source.transform) for source in sources(tensors)]


def _row(name: str, ndim: int) -> tuple[str, Axes]:
    """The path and the transform of a tensor."""
    *parents, last = re.sub(r"\.(\d+)", r"_\1", name).split(".")
    transform = identity
    if last == "weight" and ndim == 1:
        last = "scale"
    elif last == "weight" and ndim == 2 and "embed" in parents[-1]:
        last = "embedding"
    elif last == "weight":
        last, transform = "kernel", conv if ndim == 4 else linear
    return "/".join([*parents, last]), transform
