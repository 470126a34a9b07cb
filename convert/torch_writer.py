"""PyTorch checkpoints written: safetensors shards and their index, as transformers lays them out.

Files are laid out before the first tensor is read, and each tensor is written in blocks where it belongs. A shard gets
its header when all of it is there: what a killed run leaves is no safetensors file.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_vlm.array_files import BLOCK, ArrayFiles, ArrayInfo
from flax_vlm.whole_folder import Draft

from .errors import ConversionError
from .rules import Target
from .stream import WORKERS, Content, Moved, Progress, Stream, cast, packed, row_blocks, written_dtype
from .torch_files import BY_NAME, SPELLINGS, Shaped, TensorInfo

INDEX = "model.safetensors.index.json"


def write_tensors(
    draft: Draft,
    targets: Sequence[Target],
    arrays: ArrayFiles,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[Progress], None] | None = None,
    workers: int = WORKERS,
) -> Moved:
    """Writes shards, and their index if there are several, in the draft, going on with what a killed run left there.

    Args:
      dtype: cast floating tensors to it.
      max_shard_size: bytes, or a string such as "5GB"; one file where everything fits.
      progress: called after every block, from several threads but never at the same time.
    """
    by_name = {target.torch: target for target in targets}
    plan = {name: TensorInfo(target.shape, _one_dtype(target, arrays, dtype)) for name, target in by_name.items()}
    shards = _split(draft.folder, plan, max_shard_size)
    home = {name: shard for shard in shards for name in shard.starts}
    stream = Stream(draft, {name: info.nbytes for name, info in plan.items()}, progress)

    def move(name: str) -> Mapping[str, Content]:
        contents = {path: Content() for path in by_name[name].flax}
        position = home[name].starts[name]
        for path, block in _blocks(by_name[name], arrays):
            block = packed(cast(block, plan[name].dtype))
            contents[path].add(block)
            _write_all(home[name].file, block, position)
            position += block.nbytes
            stream.passed(name, block.nbytes)
        return contents

    def flush(names: list[str]) -> None:
        for shard in {home[name] for name in names}:
            os.fsync(shard.file)

    try:
        kept = {shard for shard in shards if shard.reserve()}
        waiting = [name for name in plan if name not in draft.done or home[name] not in kept]
        stream.run(waiting, move, flush, workers)
        for shard in shards:
            shard.finish()
    finally:
        for shard in shards:
            shard.close()
    if len(shards) > 1:
        total = sum(info.nbytes for info in plan.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: home[name].path.name for name in plan}}
        (draft.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return stream.outcome()


def _one_dtype(target: Target, arrays: ArrayFiles, dtype: Any) -> np.dtype:
    found = {written_dtype(arrays.tensors[path].dtype, dtype) for path in target.flax}
    if len(found) > 1:
        came = " and ".join(sorted(map(str, found)))
        raise ConversionError(f"{target.torch}: expected parts of one dtype, came {came}. Cast with dtype=.")
    return found.pop()


class _Shard:
    """One file: its header, and where the bytes of each of its tensors start."""

    def __init__(self, path: Path, tensors: Mapping[str, Shaped]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        # The format allows no gaps, so wide dtypes go first: each tensor is then aligned to its own item size.
        for name, tensor in sorted(tensors.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
            dtype = np.dtype(tensor.dtype)
            if dtype not in SPELLINGS:
                raise ConversionError(f"{name}: expected one of {', '.join(BY_NAME)}, came {dtype}. Cast with dtype=.")
            offsets[name], end = end, end + math.prod(tensor.shape) * dtype.itemsize
            header[name] = {
                "dtype": SPELLINGS[dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.path = path
        self._header = len(text).to_bytes(8, "little") + text
        self._size = len(self._header) + end
        self.starts = {name: len(self._header) + offset for name, offset in offsets.items()}
        self.file = -1

    def reserve(self) -> bool:
        """Opens the file; whether it was there already, in this size."""
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        kept = os.fstat(self.file).st_size == self._size
        if not kept:
            os.ftruncate(self.file, 0)
            os.ftruncate(self.file, self._size)
        return kept

    def finish(self) -> None:
        _write_all(self.file, np.frombuffer(self._header, np.uint8), 0)
        os.fsync(self.file)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _split(folder: Path, plan: Mapping[str, TensorInfo], max_shard_size: int | str) -> list[_Shard]:
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(plan),
        get_storage_size=lambda info: info.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return [
        _Shard(folder / file, {name: plan[name] for name in names}) for file, names in split.filename_to_tensors.items()
    ]


def _blocks(target: Target, arrays: ArrayFiles) -> Any:
    """A tensor's rows in order, as views of (path, block) read from its parameters."""
    for path in target.flax:
        info = arrays.tensors[path]
        axis = target.transform.slowest_axis(len(info.shape))
        if axis is None:
            yield path, target.transform.to_torch(arrays.read(path))
            continue
        for rows in row_blocks(info.shape[axis], _rows_at_once(info, axis)):
            index = tuple(rows if each == axis else slice(None) for each in range(len(info.shape)))
            yield path, target.transform.to_torch(arrays.read(path, index))


def _rows_at_once(info: ArrayInfo, axis: int) -> int:
    """As many as BLOCK holds in whole chunks, so that no chunk is read twice."""
    row = info.nbytes // max(1, info.shape[axis])
    return info.chunks[axis] * max(1, BLOCK // max(1, row * info.chunks[axis]))


def _write_all(file: int, array: np.ndarray, position: int) -> None:
    data = memoryview(array.reshape(-1).view(np.uint8).data)
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written
