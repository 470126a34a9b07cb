"""Folders that appear whole or not at all: journals, locks, full disks and refused folders."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from flax_vlm.whole_folder import Draft, whole_folder

_CONTEXT = multiprocessing.get_context("forkserver")


class Stop(Exception):
    """An end that another try may not share."""


def work(draft: Draft, pieces: range) -> list[int]:
    """Writes and notes those of `pieces` that are not done; returns them."""
    todo = [piece for piece in pieces if str(piece) not in draft.done]
    for piece in todo:
        (draft.folder / str(piece)).write_text("piece")
        draft.note({str(piece): piece})
    return todo


def stopped(target: Path, job: Any, pieces: range = range(3), **options: Any) -> None:
    """A writer that ends after `pieces`."""
    with pytest.raises(Stop), whole_folder(target, job=job, **options) as draft:
        work(draft, pieces)
        raise Stop


def finished(target: Path, job: Any, pieces: range = range(5), **options: Any) -> list[int]:
    """A writer that comes to its end; returns what it did itself."""
    with whole_folder(target, job=job, **options) as draft:
        todo = work(draft, pieces)
        (draft.folder / "config.json").write_text(json.dumps(job))
    assert sorted(os.listdir(target)) == [*map(str, pieces), "config.json"]
    assert os.listdir(target.parent) == [target.name]
    return todo


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "target"


@pytest.fixture
def journal(target: Path) -> Path:
    return target.with_name(".target.journal")


def test_what_is_done_stays_done(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(target, job={"to": [1, "a"]})
    assert not target.exists()
    assert "the same command goes on" in caplog.text
    assert finished(target, job={"to": [1, "a"]}) == [3, 4]


def test_another_job_starts_afresh(target: Path) -> None:
    stopped(target, job=1, pieces=range(9))
    assert finished(target, job=2) == [0, 1, 2, 3, 4]


def test_nothing_is_left_of_what_cannot_go_on(target: Path) -> None:
    with pytest.raises(Stop), whole_folder(target) as draft:  # no job
        work(draft, range(3))
        raise Stop
    with pytest.raises(Stop), whole_folder(target, job=1) as draft:  # nothing noted
        (draft.folder / "0").write_text("piece")
        raise Stop
    with pytest.raises(ValueError), whole_folder(target, job=1) as draft:  # the next try would fail alike
        work(draft, range(3))
        raise ValueError
    assert os.listdir(target.parent) == []


def test_a_torn_last_line_is_not_believed(target: Path, journal: Path) -> None:
    stopped(target, job=1)
    journal.write_bytes(journal.read_bytes() + b'["3", 3')
    stopped(target, job=1, pieces=range(4))
    assert finished(target, job=1) == [4]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:2], b"\0" * 9, *lines[3:]],
        lambda lines: [*lines[:2], b'["1"', *lines[3:]],
        lambda lines: [*lines[:2], b"3", *lines[3:]],
        lambda lines: [*lines[:2], b'[["1"], 1]', *lines[3:]],
        lambda lines: [b"\xff", *lines[1:]],
        lambda lines: [b"[" * 100_000, *lines[1:]],
        lambda lines: [lines[0], b"[" * 100_000, *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [],
    ],
)
def test_a_damaged_journal_starts_afresh(damage: Any, target: Path, journal: Path) -> None:
    stopped(target, job=1)
    journal.write_bytes(b"\n".join(damage(journal.read_bytes().split(b"\n"))))
    assert finished(target, job=1) == [0, 1, 2, 3, 4]


def test_a_journal_without_its_draft_starts_afresh(target: Path, journal: Path) -> None:
    stopped(target, job=1)
    shutil.rmtree(target.with_name(".target.partial"))
    assert journal.exists()
    assert finished(target, job=1) == [0, 1, 2, 3, 4]


def test_an_interrupted_clean_up_is_not_gone_on_with(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pieces are gone, and nothing may call them done."""

    def interrupted(folder: Path, **_: Any) -> None:
        (folder / "1").unlink()
        raise KeyboardInterrupt

    def fails(job: int, error: type[BaseException]) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", interrupted)
            with whole_folder(target, job=job):
                raise error

    stopped(target, job=1)
    fails(2, Stop)  # while what another job left is removed
    stopped(target, job=1)
    fails(1, ValueError)  # while what a fault made useless is removed
    assert finished(target, job=1) == [0, 1, 2, 3, 4]


def _write(target: Path, overwrite: bool, pipe: Any) -> None:
    try:
        with whole_folder(target, overwrite, job=1) as draft:
            work(draft, range(3))
            pipe.send("writing")
            pipe.recv()
            (draft.folder / "config.json").write_text("{}")
        pipe.send("finished")
    except OSError as error:
        pipe.send(str(error))


def test_two_writers(target: Path) -> None:
    ours, theirs = _CONTEXT.Pipe()
    other = _CONTEXT.Process(target=_write, args=(target, False, theirs))
    other.start()
    assert ours.recv() == "writing"
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is being written by another"), whole_folder(target, overwrite):
            pytest.fail("let in")
    ours.send("go on")
    assert ours.recv() == "finished"
    other.join()
    with pytest.raises(FileExistsError, match="target exists: choose another"), whole_folder(target):
        pytest.fail("let in")
    assert finished(target, job=2, overwrite=True)


def test_what_a_dead_writer_left_is_taken_over(target: Path) -> None:
    ours, theirs = _CONTEXT.Pipe()
    other = _CONTEXT.Process(target=_write, args=(target, False, theirs))
    other.start()
    assert ours.recv() == "writing"
    other.kill()
    other.join()
    assert not target.exists()
    assert finished(target, job=1) == [3, 4]


def test_a_writer_that_comes_in_the_last_moment(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one finished between the first look and the lock: its folder stays, and no draft is left."""
    lock = fcntl.flock

    def late(file: Any, how: int) -> None:
        target.mkdir()
        (target / "config.json").write_text("theirs")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileExistsError, match="target exists"), whole_folder(target, job=1):
        pytest.fail("let in")
    assert (target / "config.json").read_text() == "theirs"
    assert os.listdir(target.parent) == ["target"]


def test_a_journal_that_vanishes_before_it_is_locked(
    target: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer has just finished: the lock of its journal keeps nobody out."""
    lock = fcntl.flock

    def late(file: Any, how: int) -> None:
        monkeypatch.undo()
        journal.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with whole_folder(target, job=1) as draft:
        work(draft, range(3))
        with pytest.raises(FileExistsError, match="is being written by another"), whole_folder(target):
            pytest.fail("let in")
    assert target.is_dir() and not journal.exists()


def test_an_interrupt_while_a_folder_is_replaced_puts_it_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(target, job="old")
    rename = os.rename

    def interrupted(source: Path, to: Path) -> None:
        if to == target and source.name.endswith(".partial"):
            monkeypatch.undo()
            raise KeyboardInterrupt
        rename(source, to)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finished(target, job="new", overwrite=True)
    assert (target / "config.json").read_text() == '"old"'
    assert finished(target, job="new", overwrite=True) == []
    assert (target / "config.json").read_text() == '"new"'


def test_half_of_a_replaced_folder_is_not_put_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(target, job="old")

    def interrupted(folder: Path, **_: Any) -> None:
        (folder / "1").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        finished(target, job="new", overwrite=True)
    assert (target / "config.json").read_text() == '"new"'
    shutil.rmtree(target)
    assert finished(target, job="newer") == [0, 1, 2, 3, 4]


def test_a_full_disk_is_known_before(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 2000, 2000))
    with pytest.raises(OSError) as caught, whole_folder(target, job=1, nbytes=3000):
        pytest.fail("let in")
    assert caught.value.errno == errno.ENOSPC
    assert "the disk is full: at least 3,000 bytes are needed, 2,000 are free. Make room" in str(caught.value)
    assert os.listdir(target.parent) == []

    with pytest.raises(Stop), whole_folder(target, job=1, nbytes=2000) as draft:  # this fits
        (draft.folder / "0").write_bytes(b"1" * 8192)
        draft.note({"0": 0})
        raise Stop
    assert finished(target, job=1, nbytes=10_000) == [1, 2, 3, 4]  # and so does this, with what is there


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(number: int, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError) as caught, whole_folder(target, job=1, nbytes=5_000_000) as draft:
        work(draft, range(2))
        raise OSError(number, os.strerror(number), str(draft.folder / "2"))
    assert "the disk is full: at least 5,000,000 bytes are needed" in str(caught.value)
    assert "then run the same again" in str(caught.value)
    assert not target.exists()
    assert finished(target, job=1) == [2, 3, 4]


def test_a_journal_that_the_disk_has_no_room_for(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="the disk is full"), whole_folder(target, job=1) as draft:
        work(draft, range(2))
        monkeypatch.setattr(os, "fsync", full)
        work(draft, range(3))
    monkeypatch.undo()
    assert finished(target, job=1)[-2:] == [3, 4]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_parent_that_cannot_be_written(number: int, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under root everything can be written, so the system is told to refuse."""
    target.parent.mkdir()
    opens = Path.open

    def refused(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if self.parent == target.parent and mode != "r":
            raise OSError(number, os.strerror(number), str(self))
        return opens(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError) as caught, whole_folder(target):
        pytest.fail("let in")
    assert f"expected a folder that can be written, came: {os.strerror(number)}" in str(caught.value)
    assert str(target.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_target(target: Path) -> None:
    source = str(target.parent / "source" / "model.safetensors")
    with pytest.raises(PermissionError) as caught, whole_folder(target, job=1):
        raise PermissionError(errno.EACCES, "Permission denied", source)
    assert source in str(caught.value) and "can be written" not in str(caught.value)
