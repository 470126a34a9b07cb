"""From logical axis names to shardings.

Modules name the axes of their parameters ("embed", "mlp", "heads", "vocab", ...) and know no mesh; a table of rules
maps names to mesh axes. The mesh has the axes `data`, `fsdp` and `tensor`.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Rules: TypeAlias = Sequence[tuple[str, str | tuple[str, ...] | None]]

# Every device holds all parameters; batches are split.
REPLICATED: Rules = (("batch", ("data", "fsdp")),)
# Parameters are split over `fsdp` along their model width, and over `tensor` along heads and feed-forward width.
FSDP: Rules = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor; one of them may be -1 and takes what is left.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        raise ValueError(f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fill {len(devices)} devices")
    # Linen's logical partitioning leaves the placement of intermediates to the compiler: Auto axes.
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices)


def shardings(boxed: Any, mesh: Mesh, rules: Rules = FSDP) -> Any:
    """A NamedSharding for every parameter of `jax.eval_shape(model.init, ...)["params"]` (names still attached).

    An axis that the mesh axis does not divide evenly stays whole.
    """
    table = dict(rules)

    def place(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        shape = nn.meta.unbox(leaf).shape
        spec = []
        for name, size in zip(names, shape, strict=bool(names)):
            axes = table.get(name or "")
            spec.append(axes if axes and size % _ways(mesh, axes) == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def _ways(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
