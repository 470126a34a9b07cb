"""Parameters written as a native checkpoint's arrays, straight from the files they are in."""

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_vlm.array_files import chunk_shape, create_array, publish, sync_array
from flax_vlm.whole_folder import Draft

from .rules import Reader, Source
from .stream import WORKERS, Content, Moved, Progress, Stream, cast, packed, row_blocks, written_dtype

PARAMS = "params"
_STAGING = "arrays"


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
    staging = draft.folder / _STAGING
    staging.mkdir(exist_ok=True)
    _take_back(draft.folder, staging)
    places = {source.flax: staging / source.flax.replace("/", ".") for source in sources}
    by_path = {source.flax: source for source in sources}
    stream = Stream(draft, {path: written_bytes(source, dtype) for path, source in by_path.items()}, progress)

    def move(path: str) -> Mapping[str, Content]:
        return {path: write_array(places[path], by_path[path], files, dtype, stream)}

    def flush(paths: list[str]) -> None:
        for path in paths:
            sync_array(places[path])

    waiting = [path for path in by_path if path not in draft.done or not places[path].is_dir()]
    stream.run(waiting, move, flush, workers)

    def place(targets: Mapping[str, Path]) -> None:
        for path, target in targets.items():
            os.rename(places[path], target)

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
    for rows in [slice(None)] if axis is None else row_blocks(source.shape[axis], chunks[axis]):
        index = everything if axis is None else (*everything[:axis], rows, *everything[axis + 1 :])
        block = cast(source.transform.to_torch(source.read(files, index)), dtype)
        content.add(block)
        ours = packed(source.transform.to_flax(block))
        writes.append(store[index].write(ours, can_reference_source_data_indefinitely=True))
        if len(writes) > 1:
            writes.popleft().result()
        stream.passed(source.flax, ours.nbytes)
    for write in writes:
        write.result()
    return content


def written_bytes(source: Source, dtype: Any) -> int:
    return int(np.prod(source.shape, dtype=np.int64)) * written_dtype(source.info.dtype, dtype).itemsize


def _take_back(folder: Path, staging: Path) -> None:
    """Arrays that a killed run had begun to hand to Orbax."""
    for left in folder.glob(f"{PARAMS}*"):
        for header in left.glob("*/zarr.json"):
            with contextlib.suppress(OSError):  # one of that name is in staging: it will be written again
                os.rename(header.parent, staging / header.parent.name)
        shutil.rmtree(left)
