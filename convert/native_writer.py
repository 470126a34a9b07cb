"""Parameters written as a native checkpoint's arrays, straight from the files they are in."""

import contextlib
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_vlm.array_files import chunk_shape, create_array, publish, sync_array, system_errors
from flax_vlm.whole_folder import Draft

from .rules import Reader, Source
from .stream import WORKERS, Content, Moved, Progress, Stream, cast, packed, row_blocks, written_dtype

PARAMS = "params"
_STAGING = "arrays"
_START = 350 << 20  # bytes: Python with JAX, Orbax and tensorstore
_HELD = 10  # blocks a thread, measured: its rows, their copy in our layout, and what tensorstore is writing


def write_params(
    draft: Draft,
    sources: Sequence[Source],
    files: Reader,
    *,
    dtype: Any = None,
    progress: Callable[[Progress], None] | None = None,
    workers: int = WORKERS,
) -> Moved:
    """Writes `params/` under the draft, going on with what a killed run left there.

    Args:
      dtype: cast floating parameters to it.
      progress: called after every block, from several threads but never at the same time.
    """
    by_path = {source.flax: source for source in sources}
    stream = Stream(draft, {path: written_bytes(source, dtype) for path, source in by_path.items()}, progress)

    def write(places: Mapping[str, Any]) -> None:
        def move(path: str) -> Mapping[str, Content]:
            return {path: write_array(places[path], by_path[path], files, dtype, stream)}

        def flush(paths: list[str]) -> None:
            for path in paths:
                sync_array(places[path])

        waiting = [path for path in by_path if path not in draft.done or not places[path].is_dir()]
        stream.run(waiting, move, flush, workers)

    if draft.remote:  # nothing can be renamed there: Orbax marks what is whole
        publish(draft.folder / PARAMS, by_path, write)
        return stream.outcome()

    staging = draft.folder / _STAGING
    staging.mkdir(exist_ok=True)
    _take_back(draft.folder, staging)
    staged = {path: staging / path.replace("/", ".") for path in by_path}
    write(staged)

    def place(places: Mapping[str, Path]) -> None:
        for path, folder in places.items():
            os.rename(staged[path], folder)

    publish(draft.folder / PARAMS, by_path, place)
    shutil.rmtree(staging)
    return stream.outcome()


def write_array(place: Any, source: Source, files: Reader, dtype: Any, stream: Stream) -> Content:
    """Writes one parameter as a zarr array in the folder `place`."""
    dtype = written_dtype(source.info.dtype, dtype)
    axis = source.transform.slowest_axis(len(source.shape))
    chunks = chunk_shape(source.shape, dtype.itemsize, axis)
    store = create_array(place, source.shape, dtype, chunks)
    content = Content()
    writes = deque()
    everything = (slice(None),) * len(source.shape)
    try:
        for rows in [slice(None)] if axis is None else row_blocks(source.shape[axis], chunks[axis]):
            index = everything if axis is None else (*everything[:axis], rows, *everything[axis + 1 :])
            block = cast(source.transform.to_torch(source.read(files, index)), dtype)
            content.add(block)
            ours = packed(source.transform.to_flax(block))
            # Each chunk a write of its own: one of several chunks fails with the first of them, while others go on.
            target = store[index].translate_to[(0,) * ours.ndim]
            pieces = list(itertools.product(*map(row_blocks, ours.shape, chunks)))
            for piece in pieces:
                writes.append(target[piece].write(ours[piece], can_reference_source_data_indefinitely=True))
            while len(writes) > len(pieces):
                _settle(writes[0], place)
                writes.popleft()
            stream.passed(source.flax, ours.nbytes)
        for write in writes:
            _settle(write, place)
    finally:
        for write in writes:  # after an error: nothing may still be writing into a draft that is removed
            write.exception()
    return content


def _settle(write: Any, place: Any) -> None:
    with system_errors(place):
        write.result()


def written_bytes(source: Source, dtype: Any) -> int:
    return int(np.prod(source.shape, dtype=np.int64)) * written_dtype(source.info.dtype, dtype).itemsize


@dataclass(frozen=True)
class Outlook:
    """What a conversion will take.

    Attributes:
      model: the class that its parameters are of.
      parameters: how many.
      nbytes: what will be written.
      blocks: in how many pieces.
      memory: an estimate of the peak, in bytes, Python and its libraries included.
    """

    model: str
    parameters: int
    nbytes: int
    blocks: int
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.parameters:,} parameters, {self.nbytes:,} bytes to write in {self.blocks:,} blocks, "
            f"about {self.memory / 1e9:.1f} GB of memory at the peak"
        )

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=2)


def outlook(model: str, sources: Sequence[Source], dtype: Any = None, workers: int = WORKERS) -> Outlook:
    """What writing `sources` will take; nothing is read."""
    blocks, largest = 0, 0
    for source in sources:
        rows, step = _rows(source, written_dtype(source.info.dtype, dtype))
        blocks += len(list(row_blocks(rows, step)))
        largest = max(largest, written_bytes(source, dtype) * min(step, rows) // max(1, rows))
    memory = _START + workers * _HELD * largest
    return Outlook(model, len(sources), sum(written_bytes(each, dtype) for each in sources), blocks, memory)


def _rows(source: Source, dtype: np.dtype) -> tuple[int, int]:
    """A parameter's rows as PyTorch holds it, and how many of them make a block."""
    axis = source.transform.slowest_axis(len(source.shape))
    if axis is None:
        return 1, 1
    return source.shape[axis], chunk_shape(source.shape, dtype.itemsize, axis)[axis]


def _take_back(folder: Path, staging: Path) -> None:
    """Arrays that a killed run had begun to hand to Orbax."""
    for left in folder.glob(f"{PARAMS}*"):
        for header in left.glob("*/zarr.json"):
            with contextlib.suppress(OSError):  # one of that name is in staging: it will be written again
                os.rename(header.parent, staging / header.parent.name)
        shutil.rmtree(left)
