"""A file of rows is whole or not there, whenever its makers die; and none is made twice that was on the disk."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from flax_vlm.inference import row_file
from flax_vlm.inference.row_file import Row, journal_of, partial_of
from tests.inference.making_rows import ROWS, Making, expected, make, write
from tests.parallel.processes import free_address, run

JOB = {"n": 1}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rows_come_out_in_order_and_nothing_is_left_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "rows.txt"
    with row_file(target, JOB, ROWS, write) as file:
        assert not file.done.any() and file.bad == 0
        for row in random.Random(0).sample(range(ROWS), ROWS):
            assert not target.exists()
            file.note({row: Row(row % 4 != 3, b"%d" % row)})
        assert file.bad == 2 and file.done.all()
    assert target.read_bytes() == expected()
    assert names(target.parent) == ["rows.txt"]


def killed_and_resumed(target: Path, step: int) -> int:
    """Kills at a step, and goes on; how many rows were made by then."""
    assert Making(target, step).outcome() is None
    if target.exists():
        assert target.read_bytes() == expected(), "whole or not there"
    outcome = Making(target).outcome()
    assert isinstance(outcome, tuple), outcome
    made, _ = outcome
    assert made == list(range(ROWS))[-len(made) :] or not made
    assert target.read_bytes() == expected()
    assert names(target.parent) == [target.name]
    return ROWS - len(made)


def kill_at(folder: Path, steps: Sequence[int]) -> None:
    before = []
    for step in steps:
        (folder / str(step)).mkdir()
        before.append(killed_and_resumed(folder / str(step) / "rows.txt", step))
    assert sorted(before) == before, "the later it dies, the less is made again"
    assert {0, ROWS} <= set(before)


def steps_in_all(folder: Path) -> int:
    outcome = Making(folder / "rows.txt").outcome()
    assert isinstance(outcome, tuple) and outcome[0] == list(range(ROWS))
    return outcome[1]


def test_killed_at_some_moments(tmp_path: Path) -> None:
    last = steps_in_all(tmp_path)
    kill_at(tmp_path, [1, last // 3, last // 2, 3 * last // 4, last - 1, last])


@pytest.mark.slow
def test_killed_at_every_moment(tmp_path: Path) -> None:
    kill_at(tmp_path, range(1, steps_in_all(tmp_path) + 1))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_half_a_line_is_no_row(tmp_path: Path, cut: int) -> None:
    target = tmp_path / "rows.txt"
    with pytest.raises(IndexError, match="row 7 breaks"):
        make(target, JOB, breaks=7)
    journal = journal_of(target, 0)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[0]) == {"job": JOB, "rows": ROWS} and lines[-1].startswith(b"end ")
    journal.write_bytes(b"".join(lines[:-1])[:-cut])
    assert make(target, JOB) == [5, 6, 7, 8, 9]
    assert target.read_bytes() == expected()


def test_what_makes_no_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        make(tmp_path / "rows.txt", JOB, breaks=0)
    assert names(tmp_path) == []


def test_another_job_is_not_mixed_in(tmp_path: Path) -> None:
    target = tmp_path / "rows.txt"
    with pytest.raises(IndexError):
        make(target, JOB, breaks=7)
    with pytest.raises(ValueError, match=r"was begun with something else: n was 1 and is 2\. Do the same, or --over"):
        make(target, {"n": 2})
    journal_of(target, 3).write_bytes(journal_of(target, 0).read_bytes())
    assert make(target, {"n": 2}, overwrite=True) == list(range(ROWS))
    assert names(tmp_path) == ["rows.txt"]
    with pytest.raises(FileExistsError, match="exists: choose another output, or pass --overwrite"):
        make(target, {"n": 2})
    with pytest.raises(FileExistsError, match="is a folder: expected the name of a file"):
        make(tmp_path, JOB)
    assert make(target, JOB, overwrite=True) == list(range(ROWS))
    assert names(tmp_path) == ["rows.txt"]


def test_a_target_of_old_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "rows.txt"
    target.write_bytes(b"old")
    with pytest.raises(IndexError):
        make(target, JOB, overwrite=True, breaks=7)
    assert target.read_bytes() == b"old" and not partial_of(target).exists()
    with pytest.raises(FileExistsError):
        make(target, JOB)
    assert make(target, JOB, overwrite=True) == [6, 7, 8, 9]
    assert target.read_bytes() == expected()


def test_two_cannot_write_one_file(tmp_path: Path) -> None:
    target = tmp_path / "rows.txt"
    with row_file(target, JOB, 1, write) as file:
        with pytest.raises(FileExistsError, match="is being written by another process"):
            make(target, JOB)
        with pytest.raises(ValueError, match="expected one line, came 2"):
            file.note({0: Row(True, b"0\n1")})
        file.note({0: Row(True, b"0")})
    assert target.read_bytes() == b"0\n"


def test_rows_of_a_process_that_is_no_more_count(tmp_path: Path) -> None:
    target = tmp_path / "rows.txt"
    with pytest.raises(IndexError):
        make(target, JOB, breaks=3)
    os.rename(journal_of(target, 0), journal_of(target, 5))  # there were more of them
    assert make(target, JOB) == list(range(3, ROWS))
    assert target.read_bytes() == expected()
    assert names(tmp_path) == ["rows.txt"]


def test_two_processes_make_one_file(tmp_path: Path) -> None:
    target, address = tmp_path / "rows.txt", free_address()
    out = run("../inference/making_rows.py", *([target, 2, process, address] for process in range(2)))
    first, second = (json.loads(each.splitlines()[-1]) for each in out)
    # The second fails; both go on; and then there is nothing to do.
    assert first[0].endswith("process 1 of 2 failed: IndexError('row 4 breaks'). The same command goes on")
    assert second[0] == "row 4 breaks"
    assert [first[1], second[1]] == [[], [3, 4, 5, 9]], "each has its share"
    assert "exists: choose another output" in first[2] and second[2].endswith("cannot write it, and says why")
    assert target.read_bytes() == expected()
    assert names(tmp_path) == ["rows.txt"]
