"""Run by test_placing.py, once for each process of a mesh of eight devices: what is read is what its devices hold."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

import flax_vlm
from flax_vlm import checkpoint, parallel
from flax_vlm.array_files import ArrayFiles
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models.abstract import abstract_params

RULES = replace(parallel.FSDP_TENSOR, replicate_below=0)  # nothing here is large
MESHES = {"fsdp": {"data": 1, "fsdp": 8}, "fsdp and tensor": {"data": 1, "fsdp": 4, "tensor": 2}, "data": {"data": 8}}


def unique_shards(leaf: jax.Array) -> dict[str, Any]:
    """What the devices of this process hold, each slice once."""
    return {str(shard.index): shard for shard in leaf.addressable_shards}


def read_what_is_held(
    folder: Path, files: type, sizes: dict[str, int], rules: parallel.Rules = parallel.FSDP_TENSOR
) -> tuple[int, dict[str, jax.Array]]:
    """Loads a checkpoint onto a mesh; how many bytes were read, and the parameters."""
    asked: dict[str, list[tuple[Any, ...]]] = {}
    from_files = Counter()
    place, read = parallel.place, files.read

    def spy_place(shapes: Any, shardings: Any, read_slice: Any, **options: Any) -> Any:
        def spy(path: str, index: tuple[slice, ...]) -> np.ndarray:
            asked.setdefault(path, []).append(tuple((part.start, part.stop, part.step) for part in index))
            array = read_slice(path, index)
            from_files["asked"] += array.nbytes
            return array

        return place(shapes, shardings, spy, **options)

    def spy_read(self: Any, name: str, index: Any = None) -> np.ndarray:
        array = read(self, name, index)
        from_files["read"] += array.nbytes
        return array

    parallel.place, files.read = spy_place, spy_read
    vlm = flax_vlm.from_pretrained(folder, mesh=parallel.make_mesh(**sizes), rules=rules)
    parallel.place, files.read = place, read

    held, split_axes = 0, set()
    params = flatten_params(vlm.params)
    for path, leaf in params.items():
        shards = unique_shards(leaf)
        assert len(set(asked[path])) == len(asked[path]) == len(shards), f"{path}: {asked[path]} for {[*shards]}"
        held += sum(shard.data.nbytes for shard in shards.values())
        if leaf.ndim == 2 and path.endswith("kernel"):
            part = leaf.sharding.shard_shape(leaf.shape)
            split_axes |= {axis for axis in (0, 1) if part[axis] < leaf.shape[axis]}
    assert from_files["asked"] == from_files["read"] == held, (from_files, held)
    assert split_axes == ({0, 1} if "fsdp" in sizes else set()), "along torch's columns and its rows"
    return held, params


def restore_with_orbax(folder: Path, sizes: dict[str, int]) -> None:
    """Stock Orbax puts a converted checkpoint on the mesh, and it is what from_pretrained puts there."""
    mesh = parallel.make_mesh(**sizes)
    expected = flax_vlm.from_pretrained(folder, mesh=mesh, rules=RULES)
    boxed = abstract_params(expected.model)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        parallel.shardings(boxed, mesh, RULES),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / checkpoint.PARAMS, target)
    theirs, ours = flatten_params(restored), flatten_params(expected.params)
    assert theirs.keys() == ours.keys()
    for path, leaf in ours.items():
        assert theirs[path].sharding == leaf.sharding and theirs[path].dtype == leaf.dtype, path
        shards = unique_shards(leaf)
        for index, shard in unique_shards(theirs[path]).items():
            np.testing.assert_array_equal(shard.data, shards[index].data, err_msg=path)


def main(folder: Path, processes: int, process: int, address: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 8 // processes
    for name, sizes in MESHES.items():
        for layout, files in (("hf", TorchFiles), ("native", ArrayFiles)):
            held, params = read_what_is_held(folder / layout, files, sizes, RULES)
            whole = sum(leaf.nbytes for leaf in params.values())
            assert (held < whole) == (processes > 1 and "fsdp" in sizes), f"{held} of {whole} bytes"
            print(f"{name}, {layout}: {held / whole:.2f}")
    read_what_is_held(folder / "idefics", TorchFiles, MESHES["fsdp and tensor"], RULES)
    if processes == 1:
        restore_with_orbax(folder / "native", MESHES["fsdp and tensor"])
        print("restored")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
