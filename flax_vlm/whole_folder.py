"""Folders that appear whole or not at all, and work on them that goes on where it was killed.

A folder is written beside its target, as `.<name>.partial`, and renamed at the end. While it is written there is a
journal, `.<name>.journal`, locked by its writer: a second writer of the same target is refused, and the next one finds
what is done. A folder that is replaced is `.<name>.replaced` until the new one stands in its place.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("flax_vlm")


class Draft:
    """A folder that is being written.

    Attributes:
      folder: where to write.
      done: key -> value of everything noted, before a kill too.
      remote: whether the folder is in cloud storage, and already the target.
    """

    def __init__(self, folder: Any, journal: Any, done: dict[str, Any]) -> None:
        self.folder = folder
        self.done = done
        self.remote = journal is None
        self._journal = journal

    def note(self, entries: Mapping[str, Any]) -> None:
        """Remembers that these pieces are done; they must be on the disk already."""
        self.done.update(entries)
        if self._journal is None:
            return
        for key, value in entries.items():
            self._journal.write(json.dumps([key, value]).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


@contextlib.contextmanager
def whole_folder(
    target: str | Path, overwrite: bool = False, *, job: Any = None, marker: str = "config.json", nbytes: int = 0
) -> Iterator[Draft]:
    """A draft that becomes `target` at the end of the block.

    If the block raises, the draft vanishes, unless a `job` was given and something noted: then it stays, and the next
    call with an equal job goes on with it.

    Args:
      overwrite: replace a folder that is there and holds the file `marker`.
      job: what the work depends on, as JSON; None for work that starts afresh every time.
      nbytes: how much will be written.

    Raises:
      FileExistsError: when something is there that is not to be replaced, or another process is writing it.
      OSError: when the disk has no room for `nbytes`, or the folder of `target` cannot be written.
    """
    target = resolved(target)
    folder, replaced = draft_of(target), target.with_name(f".{target.name}.replaced")
    _check_taken(target, overwrite, marker)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, target) as journal:
            _put_back(replaced, target, marker)
            _check_taken(target, overwrite, marker)
            draft = Draft(folder, journal, _resume(folder, journal, job))
            try:
                _check_room(folder, nbytes)
                yield draft
                _place(folder, target, replaced, marker)
            except BaseException as error:
                _put_back(replaced, target, marker)
                if job is None or not draft.done or isinstance(error, ValueError):  # another try would fail alike
                    _forget(journal)
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    logger.warning("what is done stays in %s: the same command goes on, or remove it", folder)
                raise
    except OSError as error:
        explain(error, target, nbytes)
        raise


def draft_of(target: str | Path) -> Path:
    """Where `target` is written."""
    target = resolved(target)
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def remote_folder(target: Any, overwrite: bool = False, *, marker: str = "config.json") -> Iterator[Draft]:
    """A draft in cloud storage, where nothing can be renamed: write `marker` last, for until then nothing loads.

    Nothing goes on after a kill there: the next call starts afresh.

    Args:
      target: an etils.epath.Path.
      overwrite: replace what is there.

    Raises:
      FileExistsError: when `marker` is there and is not to be replaced.
    """
    try:
        taken = (target / marker).exists()
    except ImportError as error:
        raise OSError(f"{target}: cloud storage needs more: pip install flax-vlm[gcs] ({error})") from error
    if taken:
        if not overwrite:
            raise FileExistsError(f"{target} exists: choose another target, or pass overwrite=True (--overwrite)")
        (target / marker).unlink()
    target.mkdir(parents=True, exist_ok=True)
    yield Draft(target, None, {})


def resolved(path: str | Path) -> Path:
    """`path`, absolute, without symbolic links.

    Raises:
      OSError: where the links go in a circle.
    """
    try:
        return Path(path).resolve()
    except RuntimeError as error:  # Python 3.11 and 3.12
        raise OSError(errno.ELOOP, "expected a path, came links that go in a circle. Remove them", str(path)) from error


def _check_taken(target: Path, overwrite: bool, marker: str) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another target, or pass overwrite=True (--overwrite)")
    if not (target / marker).is_file():
        raise FileExistsError(f"{target} exists and holds no {marker}: only a checkpoint is overwritten")


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[Any]:
    """The journal of a draft, made if need be, ours alone; it goes when there is no draft any more."""
    path = folder.with_suffix(".journal")
    with locked(path, target) as journal:
        try:
            yield journal
        finally:
            if not folder.exists():
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, target: Path) -> Iterator[Any]:
    """The file at `path`, to read and to append to, made if need be, ours alone.

    Raises:
      FileExistsError: when another process has it, which then writes `target`.
    """
    while True:
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"{target} is being written by another process: wait for it, or choose another target"
                raise FileExistsError(message) from None
            if not _is_at(path, file):  # another writer has just finished, and removed it
                continue
            yield file
            return


def _is_at(path: Path, file: Any) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _resume(folder: Path, journal: Any, job: Any) -> dict[str, Any]:
    """What the journal says is done of `job`. What was left of any other is removed."""
    header = json.dumps({"job": job}).encode()
    journal.seek(0)
    whole = journal.read().split(b"\n")[:-1]  # a kill may have cut the last one
    if job is not None and whole and whole[0] == header and folder.is_dir():
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # a damaged journal says nothing
            done = dict(json.loads(line) for line in whole[1:])
            if done:
                journal.truncate(sum(len(line) + 1 for line in whole))
                return done
    _forget(journal)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    journal.write(header + b"\n")
    journal.flush()
    return {}


def _forget(journal: Any) -> None:
    """Empties the journal: before anything that it calls done is removed, or a kill would leave half of that."""
    journal.truncate(0)
    os.fsync(journal.fileno())


def _check_room(folder: Path, nbytes: int) -> None:
    written = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if nbytes - written > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _place(folder: Path, target: Path, replaced: Path, marker: str) -> None:
    _discard(replaced, marker)
    if target.exists():
        os.rename(target, replaced)
    os.rename(folder, target)
    sync_folder(target.parent)
    _discard(replaced, marker)


def sync_folder(folder: Path) -> None:
    """Names in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _put_back(replaced: Path, target: Path, marker: str) -> None:
    """What a writer that ended between the two renames of `_place` left without its name."""
    if not target.exists() and (replaced / marker).is_file():
        os.rename(replaced, target)


def _discard(replaced: Path, marker: str) -> None:
    """Removes a folder, its marker first: what a kill leaves of it is not put back."""
    if replaced.exists():
        (replaced / marker).unlink(missing_ok=True)
        shutil.rmtree(replaced)


def explain(error: OSError, target: Path, nbytes: int) -> None:
    """Raises `error` again as a sentence that says what to do, where there is one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        needs = f"at least {nbytes:,} bytes are needed" if nbytes else "more is needed"
        message = f"{target}: the disk is full: {needs}, {free:,} are free. Make room, then run the same again"
        raise OSError(errno.ENOSPC, message) from error
    refused = str(error.filename) if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
    # On the way to the target, or one of the names beside it; not a source that nobody may read.
    if refused and (target.is_relative_to(refused) or refused.startswith(str(target.with_name(f".{target.name}.")))):
        message = f"expected a folder that can be written, came: {error.strerror}. Choose another target"
        raise PermissionError(error.errno, message, str(target.parent)) from error
