"""Attention on each device's own rows and heads.

Left to itself, the compiler splits plain products well, but it cannot split a kernel, and for a loop over rows it
gathers the whole batch. Rows and heads are independent of each other, so where a mesh is in effect (`jax.set_mesh`,
with linen's logical axis rules) attention runs under `shard_map`, and all in it sees one device's share.

B batch   T queries   S keys   N query heads   K key/value heads   H head width
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from flax_vlm.layers.partitioning import ways


def per_device(
    attention: Callable[..., Float[Array, "B T N H"]],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *extras: Any,
) -> Float[Array, "B T N H"]:
    """`attention(query, key, value, *extras)`, over a mesh if one is in effect.

    Rows go where the rules send "batch" and heads where they send "heads", unless the mesh does not divide them evenly:
    then every device has them all.

    Args:
      extras: trees of arrays [#B ...]: with four axes the second counts heads, [#B #N T S].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or mesh.are_all_axes_manual:
        return attention(query, key, value, *extras)
    batch, _, num_heads, _ = query.shape
    rows, heads = logical_to_mesh_axes(("batch", "heads")) or (None, None)
    rows = rows if batch % ways(mesh, rows) == 0 else None
    heads = heads if num_heads % ways(mesh, heads) == 0 else None
    if key.shape[2] % ways(mesh, heads):  # fewer key/value heads than parts: each device takes those of its queries
        key, value = (jnp.repeat(array, num_heads // array.shape[2], axis=2) for array in (key, value))

    def spec(array: Array) -> PartitionSpec:
        head_axis = heads if array.ndim == 4 and array.shape[1] == num_heads else None
        return PartitionSpec(rows if array.shape[0] == batch else None, head_axis)

    whole = PartitionSpec(rows, None, heads)
    specs = (whole, whole, whole, *(jax.tree.map(spec, each) for each in extras))
    return jax.shard_map(attention, in_specs=specs, out_specs=whole, check_vma=False)(query, key, value, *extras)
