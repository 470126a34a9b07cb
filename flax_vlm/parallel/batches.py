"""Batches on a mesh: which rows a process reads, and how those of all processes become one array."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flax_vlm.parallel.rules import FSDP_TENSOR, Rules, find_rules


def batch_sharding(mesh: Mesh, rules: Rules | str = FSDP_TENSOR) -> NamedSharding:
    """Of every array of a batch: its rows are split, its other axes whole."""
    return NamedSharding(mesh, find_rules(rules).spec(["batch"]))


def process_share(mesh: Mesh, rules: Rules | str = FSDP_TENSOR) -> tuple[int, int]:
    """(index, count): this process reads the share `index` of `count` of every batch.

    Processes whose devices hold the same rows, as where `tensor` runs across processes, read the same share.

    Raises:
      ValueError: for a mesh on which processes hold some of their rows together and others not.
    """
    sharding = batch_sharding(mesh, rules)
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((mesh.size,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(mesh.size)))
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len(shares) * len(shares[0]) != mesh.size or len(set().union(*shares)) != mesh.size:
        raise ValueError(
            f"on the mesh {dict(mesh.shape)} some processes share a part of their rows of a batch: expected one where "
            "two have the same rows or none in common. Let tensor divide, or be a multiple of, the devices of a process"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def global_batch(mesh: Mesh, rules: Rules | str, local_batch: Any) -> Any:
    """The batch of all processes, split over the mesh, from this one's share of the rows of each array.

    Raises:
      ValueError: for a number of rows that the mesh does not divide evenly.
    """
    sharding = batch_sharding(mesh, rules)
    _, count = process_share(mesh, rules)
    ways = mesh.size // sharding.shard_shape((mesh.size,))[0]

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        rows = len(array) * count
        if rows % ways:
            raise ValueError(
                f"a batch of {rows} rows does not split over the mesh: expected a multiple of {ways}, {sharding.spec}"
            )
        return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))

    return jax.tree.map(put, local_batch)
