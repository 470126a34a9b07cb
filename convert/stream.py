"""Tensors moved from one checkpoint's files to another's: on threads, in blocks of rows, with content hashes.

What is in memory is a few blocks for each thread, whatever the size of a tensor or of the checkpoint. A block is some
rows of the tensor as PyTorch holds it: they lie together in its file, they are what is hashed, and on our side they are
whole chunks of the array. Finished tensors are flushed to the disk and noted in the draft's journal, so that a killed
conversion goes on where it was.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from flax_vlm.layers.param_tree import is_float
from flax_vlm.whole_folder import Draft

GROUP = 256 << 20  # bytes between two notes in the journal: what a kill costs, about
WORKERS = 3  # more than a small machine has cores: some of them wait for the disk
PIECE = 512 << 10  # bytes that stay in a core's cache while they are hashed and looked through


@dataclass(frozen=True)
class Progress:
    """How far a conversion is, in bytes of what it writes."""

    done: int
    total: int
    tensor: str  # the one being moved
    resumed: int = 0  # the part of `done` that a killed run left


@dataclass(frozen=True)
class Moved:
    """What became of a conversion.

    Attributes:
      tensors: how many were written, or found written by a killed run before.
      nbytes: their size.
      resumed: the part of `nbytes` that was found.
      seconds: how long it took.
      sha256: of every parameter's bytes as PyTorch holds it, after the cast.
      nonfinite: how many values of a tensor are NaN or infinite, where any are.
    """

    tensors: int
    nbytes: int
    resumed: int
    seconds: float
    sha256: Mapping[str, str]
    nonfinite: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Everything but the hashes, which the checkpoint holds."""
        return {name: value for name, value in vars(self).items() if name != "sha256"}


class Stream:
    """One conversion on its way: counts, hashes and notes what is moved."""

    def __init__(self, draft: Draft, sizes: Mapping[str, int], progress: Callable[[Progress], None] | None) -> None:
        """`sizes`: bytes of everything that will be written, by name."""
        self._draft, self._sizes, self._progress = draft, sizes, progress
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._total = sum(sizes.values())
        self._written = self._resumed = 0

    def run(
        self,
        names: Sequence[str],
        move: Callable[[str], Mapping[str, "Content"]],
        flush: Callable[[list[str]], None],
        workers: int = WORKERS,
    ) -> None:
        """Calls `move` for each name on threads; `flush`, before their contents are noted, with names that are done."""
        self._resumed = self._written = self._total - sum(self._sizes[name] for name in names)
        with ThreadPoolExecutor(workers) as pool, ExitStack() as on_exit:
            on_exit.callback(self._stopped.set)  # an error or an interrupt ends the other threads at their next block
            futures = {pool.submit(move, name): name for name in names}
            on_exit.callback(lambda: [future.cancel() for future in futures])
            moved: dict[str, Mapping[str, Content]] = {}
            for future in as_completed(futures):
                moved[futures[future]] = future.result()
                if sum(self._sizes[name] for name in moved) >= GROUP:
                    self._settle(moved, flush)
            self._settle(moved, flush)

    def _settle(self, moved: dict[str, Mapping[str, "Content"]], flush: Callable[[list[str]], None]) -> None:
        flush(list(moved))
        notes = {name: {path: each.note() for path, each in contents.items()} for name, contents in moved.items()}
        self._draft.note(notes)
        moved.clear()

    def passed(self, name: str, nbytes: int) -> None:
        """Counts a block of `name` that has been written."""
        if self._stopped.is_set():
            raise InterruptedError(f"{name}: stopped, because the conversion was")
        with self._lock:
            self._written += nbytes
            if self._progress:
                self._progress(Progress(self._written, self._total, name, self._resumed))

    def outcome(self) -> Moved:
        """When everything has been noted."""
        notes = {path: note for contents in self._draft.done.values() for path, note in contents.items()}
        return Moved(
            tensors=len(self._sizes),
            nbytes=self._total,
            resumed=self._resumed,
            seconds=time.monotonic() - self._start,
            sha256={path: note["sha256"] for path, note in notes.items()},
            nonfinite={path: note["nonfinite"] for path, note in notes.items() if note["nonfinite"]},
        )


class Content:
    """What a parameter holds, told block by block: its hash, and how many of its values are not finite."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._nonfinite = 0

    def add(self, block: np.ndarray) -> None:
        """The next rows, as PyTorch holds them."""
        flat = np.ascontiguousarray(block).reshape(-1)
        step = PIECE // flat.itemsize
        infinity = np.array(np.inf, flat.dtype) if is_float(flat.dtype) else None
        for start in range(0, flat.size, step):
            piece = flat[start : start + step]
            self._hash.update(piece.view(np.uint8).data)
            if infinity is not None:
                bits = np.dtype(f"u{flat.itemsize}")
                exponents = piece.view(bits) & infinity.view(bits)  # all ones in inf and NaN, in every float format
                if exponents.max() == infinity.view(bits):
                    self._nonfinite += int(np.count_nonzero(exponents == infinity.view(bits)))

    def note(self) -> dict[str, Any]:
        return {"sha256": self._hash.hexdigest(), "nonfinite": self._nonfinite}


def row_blocks(rows: int, step: int) -> Iterator[slice]:
    """Rows in blocks; one empty block where there are none, so that an empty tensor is written too."""
    yield from (slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step))


def written_dtype(own: np.dtype, dtype: Any) -> np.dtype:
    """What an array of dtype `own` is written as where a cast to `dtype`, or none, was asked for."""
    return np.dtype(dtype) if dtype is not None and is_float(own) else np.dtype(own)


def cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A floating array in `dtype`; any other, and any where `dtype` is None, as it is."""
    if dtype is None or not is_float(array.dtype):
        return array
    with np.errstate(over="ignore"):  # what becomes infinite is counted
        return array.astype(dtype, copy=False)


def packed(array: np.ndarray) -> np.ndarray:
    """`array` in row-major order. Large transposes go through XLA, whose blocked copy is several times numpy's."""
    device = _host()
    if array.flags.c_contiguous or array.itemsize > 4 or device is None:  # XLA halves 8-byte types unless told not to
        return np.asarray(array, order="C")
    bits = jax.device_put(array.view(f"u{array.itemsize}"), device)
    return np.asarray(bits).view(array.dtype)


@cache
def _host() -> Any:
    """XLA's CPU; None where JAX was told to go without."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
