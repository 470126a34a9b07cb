"""A file of rows that appears whole or not at all, in their order, made by several processes, and resumed after a kill.

Beside the target every process has a journal, `.<name>.journal-<its number>`, which it locks: a first line that says
what the job is, then one for each row that is done, `17 + what came of it`, or `17 - ...` of a bad one. A batch is on
the disk before the next one is noted. The next run takes what it finds in the journals, whoever wrote them, and cuts
off a line that a kill has left in halves. In the end each process says that it is through, and the first one puts the
rows together, as `.<name>.partial`, which is then renamed.

The processes share the folder, and nothing else while they work: none waits for another before its rows are done.

N rows
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool

from flax_vlm.whole_folder import explain, locked, resolved, sync_folder

_END, _PLACING = b"end ", b"placing\n"
_POLL = 0.2  # seconds


class Row(NamedTuple):
    """What came of one; `good` is False for what is told of a bad one."""

    good: bool
    content: bytes


class RowFile:
    """The rows so far.

    Attributes:
      done: which rows need not be made again.
      bad: how many of those that this process has noted are bad, in earlier runs too; when there is a target, of all.
    """

    def __init__(self, journal: IO[bytes], done: Bool[np.ndarray, " N"], bad: int) -> None:
        self.done = done
        self.bad = bad
        self._journal = journal

    def note(self, rows: Mapping[int, Row]) -> None:
        """Remembers rows; when it returns they are on the disk.

        Raises:
          ValueError: for content of several lines.
        """
        lines = []
        for number, (good, content) in rows.items():
            if b"\n" in content:
                raise ValueError(f"row {number}: expected one line, came {len(content.splitlines())}")
            lines.append(b"%d %c %s\n" % (number, b"+" if good else b"-", content))
            self.bad += not good
        _append(self._journal, b"".join(lines))
        self.done[list(rows)] = True


@contextlib.contextmanager
def row_file(
    target: str | Path,
    job: Mapping[str, Any],
    number: int,
    write: Callable[[IO[bytes], Iterable[Row]], None],
    *,
    overwrite: bool = False,
) -> Iterator[RowFile]:
    """What is noted in the block, by all processes of the job, becomes `target` at its end.

    If the block raises, or the process is killed, there is no target, and the next call with an equal `job` goes on.
    All processes of a job call this, each to note its share of the rows.

    Args:
      job: what the rows depend on, as JSON.
      number: of rows; those of 0 to `number` - 1 are to be noted.
      write: makes the target of its rows, in order, which it may go through more than once.
      overwrite: replace a file that is there, and drop what is left of another job.

    Raises:
      FileExistsError: when there is a target, or another process is writing it.
      ValueError: when what was begun is another job.
      OSError: when the disk is full or the folder cannot be written, and in all processes when one of them fails.
    """
    target, index, count = resolved(target), jax.process_index(), jax.process_count()
    header = json.dumps({"job": job, "rows": number}, sort_keys=True).encode() + b"\n"
    with contextlib.ExitStack() as stack:
        journal: Any = None
        own: _Read | None = None
        with _told_to_all(target) as say:
            if index == 0:
                journal = stack.enter_context(_open_first(target, header, overwrite))
                if not say(_is_placed(target, journal, header)):
                    own = _resume(journal, header)  # before the others look for its words
        if say():  # by a run that was killed while it removed the journals
            yield RowFile(journal, np.ones(number, bool), sum(_read(path).bad for path in _journals(target)))
            if index == 0:
                _remove(_journals(target))
            return
        if index > 0:  # the words of the first one: folders may have other dates elsewhere
            with journal_of(target, 0).open("rb") as first:
                header = first.readline()
            journal = stack.enter_context(locked(journal_of(target, index), target))
            own = _resume(journal, header)
        assert own is not None
        _meet(f"begun {target}")  # what each had to say of an earlier end is gone
        done = np.zeros(number, bool)
        for path in _journals(target):
            done[_read(path).rows] = True
        rows = RowFile(journal, done, own.bad)
        try:
            yield rows
            _append(journal, _END + b"null\n")
            _wait(target, count)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the disk may be full
                _append(journal, _END + json.dumps(repr(error)).encode() + b"\n")
            if count == 1 and not rows.done.any():
                journal_of(target, 0).unlink()
            if isinstance(error, OSError):
                explain(error, target, 0)
            raise
        _meet(f"through {target}")
        with _told_to_all(target):
            if index == 0:
                rows.bad = sum(_read(path).bad for path in _journals(target))
                _put_together(target, journal, number, write)


def journal_of(target: Path, index: int) -> Path:
    """Where process `index` notes its rows."""
    return target.with_name(f".{target.name}.journal-{index}")


def partial_of(target: Path) -> Path:
    """Where `target` is put together."""
    return target.with_name(f".{target.name}.partial")


def _journals(target: Path) -> list[Path]:
    prefix = f".{target.name}.journal-"
    return sorted(path for path in target.parent.iterdir() if path.name.startswith(prefix))


@contextlib.contextmanager
def _told_to_all(target: Path) -> Iterator[Callable[..., bool]]:
    """A block whose faults in the first process are raised in all of them, which would wait for ever.

    So is a word that it says; behind the block all can ask for it.
    """
    words: list[bool] = []
    fault: Exception | None = None

    def say(*word: bool) -> bool:
        words.extend(word)
        return words[0]

    try:
        yield say
    except Exception as error:
        fault = error
        if isinstance(error, OSError):
            try:
                explain(error, target, 0)
            except OSError as explained:
                fault = explained
    if jax.process_count() > 1:
        told = multihost_utils.broadcast_one_to_all(np.array([fault is not None, bool(words and words[0])]))
        if told[0] and fault is None:
            raise OSError(f"{target}: the first process cannot write it, and says why")
        words[:] = [bool(told[1])]
    if fault is not None:
        raise fault


def _meet(name: str) -> None:
    """Here no process goes on before all have come."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def _open_first(target: Path, header: bytes, overwrite: bool) -> Iterator[IO[bytes]]:
    """The journal of the first process, when nothing speaks against the job."""
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder: expected the name of a file to write")
    taken = FileExistsError(f"{target} exists: choose another output, or pass --overwrite")
    if target.exists() and not overwrite and not _journals(target):
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(journal_of(target, 0), target) as journal:
        if target.exists() and not overwrite and not _is_placed(target, journal, header):
            raise taken
        for path in _journals(target):
            with path.open("rb") as other:
                begun = other.readline()
            if begun == header or not len(_read(path).rows):
                continue
            if not overwrite:
                raise ValueError(f"{target} was begun {_difference(begun, header)}. Do the same, or --overwrite it")
            if path != journal_of(target, 0):
                path.unlink()
        yield journal


def _is_placed(target: Path, journal: IO[bytes], header: bytes) -> bool:
    """Whether a run of this job was killed when the target stood in its place already."""
    journal.seek(0)
    is_ours = journal.readline() == header
    journal.seek(-min(len(_PLACING), os.fstat(journal.fileno()).st_size), os.SEEK_END)
    return is_ours and journal.read() == _PLACING and target.exists() and not partial_of(target).exists()


def _difference(begun: bytes, header: bytes) -> str:
    """What another job did otherwise."""
    try:
        old, new = ({"rows": each["rows"]} | each["job"] for each in map(json.loads, (begun, header)))
    except (ValueError, KeyError, TypeError):
        return "by something else"
    names = [name for name in new if old.get(name) != new[name]]
    told = [f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in names if name not in ("model", "data")]
    told += [f"the {name} was another" for name in names if name in ("model", "data")]
    return f"with something else: {', '.join(told)}"


class _Read(NamedTuple):
    """What a journal holds: rows and where their lines begin; how many of them are bad, and where the rows end."""

    rows: np.ndarray
    begins: np.ndarray
    bad: int
    end: int


def _read(path: Path) -> _Read:
    rows, begins, bad, at = [], [], 0, 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
        at = len(lines.readline())
        for line in lines:
            number, _, rest = line.partition(b" ")
            if not (number.isdigit() and rest[:2] in (b"+ ", b"- ") and line.endswith(b"\n")):
                break
            rows.append(int(number))
            begins.append(at)
            bad += rest[:1] == b"-"
            at += len(line)
    return _Read(np.array(rows, np.int64), np.array(begins, np.int64), bad, at)


def _resume(journal: IO[bytes], header: bytes) -> _Read:
    """What this process has done of the job; what else its journal holds is cut off."""
    journal.seek(0)
    if journal.readline() != header:
        journal.truncate(0)
        _append(journal, header)
    own = _read(Path(journal.name))
    journal.truncate(own.end)
    journal.seek(0, os.SEEK_END)
    return own


def _append(journal: IO[bytes], lines: bytes) -> None:
    journal.write(lines)
    journal.flush()
    os.fsync(journal.fileno())


def _wait(target: Path, count: int) -> None:
    """Until all processes have said that they are through.

    One that dies says nothing, but then JAX ends the others.

    Raises:
      OSError: when one says that it failed.
    """
    for index in range(count):
        while (said := _last_line(journal_of(target, index))) is None:
            time.sleep(_POLL)
        if said != b"null":
            raise OSError(f"{target}: process {index} of {count} failed: {json.loads(said)}. The same command goes on")


def _last_line(path: Path) -> bytes | None:
    """What stands behind "end" in the last line; None where that is another."""
    with path.open("rb") as file:
        file.seek(-min(4096, os.fstat(file.fileno()).st_size), os.SEEK_END)
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    return last.removeprefix(_END) if last.startswith(_END) else None


def _put_together(
    target: Path, journal: IO[bytes], number: int, write: Callable[[IO[bytes], Iterable[Row]], None]
) -> None:
    partial, paths = partial_of(target), _journals(target)
    rows = _Rows(paths, number)
    with contextlib.closing(rows), partial.open("wb") as file:
        write(file, rows)
        file.flush()
        os.fsync(file.fileno())
    _append(journal, _PLACING)
    os.replace(partial, target)
    sync_folder(target.parent)
    _remove(paths)


def _remove(journals: list[Path]) -> None:
    """The first one's last, as it says that the target is whole."""
    for path in reversed(journals):
        path.unlink()


class _Rows(Iterable[Row]):
    """All rows in order, out of the journals."""

    def __init__(self, paths: list[Path], number: int) -> None:
        self._files = [path.open("rb") for path in paths]
        self._file, self._begin = np.full(number, -1, np.int32), np.zeros(number, np.int64)
        for file, path in enumerate(paths):
            read = _read(path)
            self._file[read.rows], self._begin[read.rows] = file, read.begins
        if (self._file < 0).any():
            missing = np.flatnonzero(self._file < 0)
            raise RuntimeError(f"{len(missing)} of {number} rows were never noted, the first is {missing[0]}")

    def __iter__(self) -> Iterator[Row]:
        for file, begin in zip(self._file.tolist(), self._begin.tolist(), strict=True):
            self._files[file].seek(begin)
            _, sign, content = self._files[file].readline()[:-1].split(b" ", 2)
            yield Row(sign == b"+", content)

    def close(self) -> None:
        for file in self._files:
            file.close()
