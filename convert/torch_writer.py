"""PyTorch checkpoints written: safetensors shards and their index, as transformers lays them out."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConversionError
from .torch_files import BY_NAME, SPELLINGS, Shaped


def write_torch(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    plan: Mapping[str, Shaped],
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """Writes `tensors`, which may come in any order, as the safetensors shards that `plan` fills in its order.

    The plan names every tensor with its shape and dtype, so files are laid out before the first array exists and each
    array is dropped once written. The folder is expected empty and must not be used if this raises.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(plan),
        get_storage_size=_nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    starts: dict[str, int] = {}
    for file, names in split.filename_to_tensors.items():
        starts |= _lay_out(folder / file, {name: plan[name] for name in names}, metadata)

    missing = dict(plan)
    for name, array in tensors:
        expected = missing.pop(name, None)
        if expected is None:
            raise ConversionError(f"{name}: expected each tensor of the plan once, came twice or unplanned.")
        if (array.shape, array.dtype) != (tuple(expected.shape), np.dtype(expected.dtype)):
            planned = f"{np.dtype(expected.dtype)} {tuple(expected.shape)}"
            raise ConversionError(f"{name}: {planned} was planned, {array.dtype} {array.shape} came; plan it so.")
        with (folder / split.tensor_to_filename[name]).open("r+b") as shard:
            shard.seek(starts[name])
            shard.write(_row_major_bytes(array))
        del array  # before the next one is made
    if missing:
        raise ConversionError(f"expected all {len(plan)} planned tensors, these never came: {', '.join(missing)}.")

    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": {name: split.tensor_to_filename[name] for name in plan}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _nbytes(tensor: Shaped) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _lay_out(path: Path, tensors: Mapping[str, Shaped], metadata: Mapping[str, str]) -> dict[str, int]:
    """Writes a safetensors header and reserves the space after it; returns where the bytes of each tensor start.

    safetensors' own writer wants every tensor of a file at once, and 0.8 corrupts those that are not contiguous.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    # The format allows no gaps, so wide dtypes go first: each tensor is then aligned to its own item size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
        dtype = np.dtype(tensor.dtype)
        if dtype not in SPELLINGS:
            raise ConversionError(f"{name}: expected one of {', '.join(BY_NAME)}, came {dtype}. Cast it with dtype=.")
        starts[name], end = end, end + _nbytes(tensor)
        header[name] = {"dtype": SPELLINGS[dtype], "shape": list(tensor.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def _row_major_bytes(array: np.ndarray) -> memoryview:
    """The bytes as a file holds them. Every transposed kernel is a view, and here its copy is made."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
