"""Arrays in memory, written as the PyTorch checkpoint that an export of them would be."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flax_vlm.array_files import ArrayInfo, Index
from flax_vlm.convert.rules import Target, identity
from flax_vlm.convert.stream import Moved
from flax_vlm.convert.torch_writer import write_tensors
from flax_vlm.whole_folder import whole_folder


class Arrays:
    """What ArrayFiles is, without files."""

    def __init__(self, state: Mapping[str, np.ndarray], chunk: int = 2) -> None:
        self._state = state
        self.tensors = {
            name: ArrayInfo(array.shape, array.dtype, tuple(min(chunk, size) or 1 for size in array.shape))
            for name, array in state.items()
        }

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        return self._state[path][index or ()]


def write_torch(
    folder: Path,
    state: Mapping[str, np.ndarray],
    max_shard_size: int | str = "5GB",
    targets: list[Target] | None = None,
) -> Moved:
    """Writes `state` as safetensors in `folder`, among what is there."""
    targets = targets or [Target(name, array.shape, (name,), identity) for name, array in state.items()]
    written = folder / "written"
    with whole_folder(written) as draft:
        moved = write_tensors(draft, targets, Arrays(state), max_shard_size=max_shard_size)
    for file in written.iterdir():
        file.rename(folder / file.name)
    written.rmdir()
    return moved
