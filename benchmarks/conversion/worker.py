"""One step of ours: `python -m benchmarks.conversion.worker STEP FOLDER [SHARD_SIZE]`.

FOLDER is that of the run. A family that this project knows goes through its public
functions; for any other, stand-in rows go through the engine below them. The last line printed is JSON: the seconds of
the work, without start and imports.
"""

import json
import mmap
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.conversion import EXPORTED, NATIVE, PYTORCH, stand_in
from flax_vlm import checkpoint, parallel, pretrained
from flax_vlm.convert import native_writer, port, torch_writer
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.models import registry
from flax_vlm.whole_folder import whole_folder


def is_known(folder: Path) -> bool:
    """Whether the checkpoint is one of a family that has its table here."""
    config = checkpoint.read_config(folder)
    try:
        registry.family(config["model_type"])
    except ValueError:
        return False
    return True


def convert(folder: Path) -> None:
    """PyTorch's files to native ones."""
    source, target = folder / PYTORCH, folder / NATIVE
    if is_known(source):
        port.to_flax(source, target)
        return
    files = TorchFiles.open(source)
    with whole_folder(target) as draft:
        checkpoint.write_config(draft.folder, checkpoint.read_config(source))
        native_writer.write_params(draft, stand_in.sources(files.tensors), files)


def export(folder: Path, shard_size: str = "5GB") -> None:
    """Native files to PyTorch's."""
    source, target = folder / NATIVE, folder / EXPORTED
    if is_known(source):
        port.to_torch(source, target, max_shard_size=shard_size)
        return
    targets = stand_in.targets(TorchFiles.open(folder / PYTORCH).tensors)
    with whole_folder(target) as draft:
        checkpoint.write_config(draft.folder, checkpoint.read_config(source))
        torch_writer.write_tensors(draft, targets, checkpoint.open_params(source), max_shard_size=shard_size)


def load_pytorch(folder: Path) -> Any:
    """The parameters, from PyTorch's files."""
    source = folder / PYTORCH
    if is_known(source):
        return pretrained.from_pretrained(source).params
    files = TorchFiles.open(source)
    sources = {each.flax: each for each in stand_in.sources(files.tensors)}
    return _place(sources, lambda path, index: sources[path].read(files, index))


def load_native(folder: Path) -> Any:
    """The parameters, from native files."""
    source = folder / NATIVE
    if is_known(source):
        return pretrained.from_pretrained(source).params
    arrays = checkpoint.open_params(source)
    return _place(arrays.tensors, arrays.read)


def _place(held: Mapping[str, Any], read: Callable[[str, tuple[slice, ...]], np.ndarray]) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {path: each.shape for path, each in held.items()}
    return parallel.place(shapes, dict.fromkeys(shapes, device), read, None)


STEPS: Mapping[str, Callable[..., Any]] = {each.__name__: each for each in (convert, export, load_pytorch, load_native)}


def main(step: str, folder: str, *options: str) -> None:
    start = time.perf_counter()
    for array in jax.tree.leaves(STEPS[step](Path(folder), *options)):
        # It may be the mapped file itself: it is loaded when its pages are in memory.
        np.asarray(array).reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max(initial=0)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
