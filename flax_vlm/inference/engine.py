"""From rows to batches of few shapes, and from these to a result for each row.

    sizes, bad = measure(work, rows)           tokens and pictures of each, by this process or all of them together
    plan = make_plan(sizes, batch_size)        rows of about one length stand together, the longest first
    for results in run(work, rows, plan): ...  [(row, result), ...], a batch at a time

The plan depends on the rows and the batch size alone: whoever runs a batch of it, after a kill or in another process,
runs the same program on the same numbers. What is done with the rows themselves is a `Work`.

N rows
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int32

READERS = 4  # threads that open pictures, a batch each, while the device computes
_UNREADABLE = -1

Done = Callable[[int], Any]  # is told how many rows more are done


class Size(NamedTuple):
    """What a row takes."""

    tokens: int = 0
    images: int = 0


class Bad(NamedTuple):
    """Of a row of which nothing can be made."""

    reason: str


class Work(Protocol):
    """What is done with rows."""

    @property
    def measure(self) -> Callable[[Any], Size] | None:
        """What a row takes, found out without opening a picture; None where all take the same."""
        ...

    def read(self, items: list[Any], size: Size, /) -> Any:
        """What goes to the device, for so many tokens and pictures a row, on the host; called from several threads."""
        ...

    def compute(self, inputs: Any, rows: Sequence[int], /) -> Sequence[Any] | np.ndarray:
        """A result for each row, whose numbers are `rows`."""
        ...


class Batch(NamedTuple):
    """Rows that run together, filled up to `width`, each with the room of the largest of them."""

    rows: tuple[int, ...]
    size: Size
    width: int


class Mapped(Sequence[Any]):
    """A sequence seen through a function, which is called whenever an item is asked for."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._function = function
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._function(self._items[index])


def measure(
    work: Work, items: Sequence[Any], *, together: bool = False, done: Done = lambda _: None
) -> tuple[Int32[np.ndarray, "N 2"], dict[int, Bad]]:
    """The `Size` of each row, negative for bad ones; and what is wrong with those that this process has measured.

    Args:
      together: every process of the job measures its share, and all get the sizes of all.
    """
    if work.measure is None:
        return np.zeros((len(items), 2), np.int32), {}
    index, count = (jax.process_index(), jax.process_count()) if together else (0, 1)
    mine = np.full((-(-len(items) // count), 2), _UNREADABLE, np.int32)
    bad: dict[int, Bad] = {}
    for place, row in enumerate(range(index, len(items), count)):
        try:
            mine[place] = work.measure(items[row])
        except Exception as error:  # as of training data: what damaged files raise has no end, and all of it is told
            bad[row] = _bad(error)
        done(count)
    if count == 1:
        return mine, bad
    shares = np.asarray(multihost_utils.process_allgather(mine))  # [count, rows of one, 2]
    return shares.swapaxes(0, 1).reshape(-1, 2)[: len(items)], bad


def make_plan(sizes: Int32[np.ndarray, "N 2"], batch_size: int, ways: int = 1) -> list[Batch]:
    """All rows but the bad ones, in batches of one width: those with most pictures, and then most tokens, first.

    Pictures are rounded up to a power of two. A model that runs out of memory does so at the start, and what is said of
    the time left errs on the safe side.

    Args:
      ways: that the devices split a batch; its width is a multiple of it.
    """
    if batch_size < 1 or batch_size % ways:
        raise ValueError(f"batch_size is {batch_size}: expected a multiple of the {ways} devices that split a batch")
    pictures = np.array([_power_of_two(images) for images in sizes[:, 1].tolist()], np.int32)
    good = np.flatnonzero(sizes[:, 0] != _UNREADABLE)
    order = good[np.lexsort((good, -sizes[good, 0], -pictures[good]))]
    width = min(batch_size, -(-len(order) // ways) * ways)
    plan = []
    for start in range(0, len(order), max(width, 1)):
        rows = order[start : start + width]
        plan.append(Batch(tuple(rows.tolist()), Size(int(sizes[rows, 0].max()), int(pictures[rows].max())), width))
    return plan


def run(work: Work, items: Sequence[Any], batches: Iterable[Batch]) -> Iterator[list[tuple[int, Any]]]:
    """(row, result) of each batch, when it is done; the result of a row of which nothing can be made is a `Bad`.

    The next batches are read while one is computed.
    """
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="batches")
    waiting: deque[Any] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_read, work, items, batch))
            if len(waiting) > READERS:
                yield _computed(work, *waiting.popleft().result())
        while waiting:
            yield _computed(work, *waiting.popleft().result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(work: Work, items: Sequence[Any], batch_size: int, done: Done = lambda _: None) -> list[Any]:
    """The results of all rows.

    Raises:
      ValueError: for rows of which nothing can be made, and where there are none.
    """
    if not len(items):
        raise ValueError("expected at least one row, came none")
    sizes, bad = measure(work, items)
    results: list[Any] = [None] * len(items)
    for row, reason in bad.items():
        _refuse(row, reason)
    for batch in run(work, items, make_plan(sizes, batch_size)):
        for row, result in batch:
            _refuse(row, result)
            results[row] = result
        done(len(batch))
    return results


def _refuse(row: int, result: Any) -> None:
    if isinstance(result, Bad):
        raise ValueError(f"row {row}, counted from 0: {result.reason}")


def _read(work: Work, items: Sequence[Any], batch: Batch) -> tuple[list[int], int, Any, list[tuple[int, Bad]]]:
    """The rows that can be computed, how many of them count, their inputs, and the others."""
    found: dict[int, Any] = {}
    bad: list[tuple[int, Bad]] = []

    def attempt(row: int, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            bad.append((row, _bad(error)))
            found.pop(row, None)

    def inputs() -> Any:
        rows = list(found.values())
        return work.read(rows + rows[-1:] * (batch.width - len(rows)), batch.size)

    for row in batch.rows:
        item = attempt(row, lambda row=row: items[row])
        if item is not None:
            found[row] = item
    read = None
    if found:
        try:
            read = inputs()
        except Exception:
            for row, item in list(found.items()):  # which of them is it?
                attempt(row, lambda item=item: work.read([item], batch.size))
            read = inputs() if found else None  # raises again where it is none of them
    rows = list(found)
    return rows + rows[-1:] * (batch.width - len(rows)), len(rows), read, bad


def _computed(
    work: Work, rows: list[int], count: int, inputs: Any, bad: list[tuple[int, Bad]]
) -> list[tuple[int, Any]]:
    results = work.compute(inputs, rows) if count else []
    return [*zip(rows[:count], results[:count], strict=True), *bad]


def _bad(error: Exception) -> Bad:
    return Bad(" ".join(f"{type(error).__name__}: {error}".split()))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 0 else 0
