"""How the large activations are split over a mesh, by the names of their axes.

Rules (`flax_vlm.parallel.Rules`) say which axes of a mesh split a named axis, of a parameter or of an activation. No
layer knows a mesh: while mesh and rules are in effect (`flax_vlm.parallel.use`), `constrain` tells the compiler
what they say; otherwise it does nothing.
"""

import math
from collections.abc import Sequence
from types import EllipsisType

import jax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Shaped

HIDDEN = ("batch", "length", None)  # states between layers
HEADS = ("batch", None, "heads", "head_dim")  # queries, keys and values
INNER = ("batch", ..., "mlp")  # of a feed-forward
LOGITS = ("batch", ..., "vocab")
ROWS = ("batch", ...)  # of anything else: pictures, say


def constrain(array: Shaped[Array, "..."], names: Sequence[str | EllipsisType | None]) -> Shaped[Array, "..."]:
    """`array`, split as the rules in effect say; `...` stands for any number of axes without a name.

    An axis that its mesh axes do not divide evenly is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto or not nn.get_logical_axis_rules():
        return array
    unnamed = [None] * (array.ndim - len(names) + 1)
    spec = logical_to_mesh_axes([name for part in names for name in (unnamed if part is ... else [part])])
    assert spec is not None, "rules are in effect"
    divided = [
        axes if size % ways(mesh, axes) == 0 else PartitionSpec.UNCONSTRAINED
        for axes, size in zip(spec, array.shape, strict=True)
    ]
    return lax.with_sharding_constraint(array, PartitionSpec(*divided))


def ways(mesh: AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """In how many parts these axes of the mesh split an axis of an array."""
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))
