"""Checkpoints that nobody trained: config.json, safetensors shards and their index, as they lie on the Hub."""

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from benchmarks.conversion.names import ITEMSIZE, Model, Shape

DRAWN = 1 << 25  # values that are drawn; every tensor is cut out of them at a place of its own
STRIDE = 9_973_391  # from one tensor's place to the next: odd, so that the first 2**25 of them differ


def make_checkpoint(
    folder: Path, model: Model, *, shard_size: str = "5GB", sparse: bool = False, seed: int = 0
) -> list[Path]:
    """Writes a checkpoint into the new folder `folder`; returns its files of weights.

    Args:
      sparse: reserve the weights without writing any, for what looks at names and shapes only.
      seed: of the weights, bfloat16 normals of a standard deviation of 0.02.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", "utf-8")
    split = split_state_dict_into_shards_factory(
        dict(model.tensors),
        get_storage_size=_nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    drawn = None if sparse else _draw(min(DRAWN, model.nbytes // ITEMSIZE), seed)
    written = 0
    for file, names in split.filename_to_tensors.items():
        shapes = {name: model.tensors[name] for name in sorted(names)}  # the order of safetensors' own writer
        with (folder / file).open("xb") as shard:
            shard.write(_header(shapes))
            if drawn is None:
                shard.truncate(shard.tell() + sum(map(_nbytes, shapes.values())))
                continue
            for shape in shapes.values():
                _write(shard, drawn, written * STRIDE % drawn.size, math.prod(shape))
                written += 1
    return [folder / file for file in split.filename_to_tensors]


def _draw(size: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(size, np.float32)
    values *= 0.02
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def _write(shard: BinaryIO, drawn: np.ndarray, start: int, size: int) -> None:
    """`size` of the values that were drawn, from `start` on, over and over."""
    while size:
        part = drawn[start : start + size]
        shard.write(part.data)
        size -= part.size
        start = 0


def _header(shapes: dict[str, Shape]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _nbytes(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _nbytes(shape: Shape) -> int:
    return math.prod(shape) * ITEMSIZE
