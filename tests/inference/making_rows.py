"""Row files made in processes of their own, which die when they are told to."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

# A server that has everything imported, and forks for each process: a start takes no time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flax_vlm.inference"])

_AUDITED = {"open", "os.mkdir", "os.remove", "os.rename"}
ROWS = 10


class Making:
    """Makes a file of `ROWS` rows in batches of three, and kills itself before its `step`-th step.

    A step is a row file's write, or a file in the folder of the target that is opened, made, renamed or removed.
    """

    def __init__(self, target: Path, step: int = 0, **options: Any) -> None:
        self._results, sender = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_make, args=(sender, target, step, options))
        self.process.start()
        sender.close()

    def outcome(self) -> tuple[list[int], int] | Exception | None:
        """The rows it made and how many steps it took, or what it raised; None where it was killed."""
        try:
            return self._results.recv()
        except EOFError:
            self.process.join()
            assert self.process.exitcode == -signal.SIGKILL, f"died of itself: {self.process.exitcode}"
            return None
        finally:
            self.process.join()


def expected() -> bytes:
    """What the file holds in the end."""
    return b"".join(b"%d%s\n" % (row, b" bad" if row % 4 == 3 else b"") for row in range(ROWS))


def write(file: IO[bytes], rows: Iterable[Any]) -> None:
    file.write(b"".join(row.content + (b"" if row.good else b" bad") + b"\n" for row in rows))


def make(target: Path, job: Any, index: int = 0, count: int = 1, *, breaks: int = ROWS, **options: Any) -> list[int]:
    """The rows that this process makes of what is left, every `count`-th batch of them; it fails at row `breaks`."""
    from flax_vlm.inference import row_file
    from flax_vlm.inference.row_file import Row

    made = []
    with row_file(target, job, ROWS, write, **options) as file:
        for batch in [range(start, min(start + 3, ROWS)) for start in range(0, ROWS, 3)][index::count]:
            rows = [row for row in batch if not file.done[row]]
            if breaks in batch:
                raise IndexError(f"row {breaks} breaks")
            if rows:
                file.note({row: Row(row % 4 != 3, b"%d" % row) for row in rows})
                made += rows
    return made


def _make(sender: Any, target: Path, step: int, options: dict[str, Any]) -> None:
    import jax

    count, taken = itertools.count(1), [0]

    def take(_: Any = None) -> None:
        """Also instead of fsync: what a killed process wrote is with the system, and a disk takes its time."""
        taken[0] = next(count)
        if taken[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and str(arguments[0]).startswith(str(target.parent)):
            take()

    jax.process_index()  # opens files of its own
    os.fsync = take
    sys.addaudithook(watch)
    result: Any
    try:
        result = make(target, {"n": 1}, **options), taken[0]
    except Exception as error:
        result = error
    sender.send(result)


def main(target: Path, processes: int, process: int, address: str) -> None:
    """One of several processes, which try three times; in the first the second one fails."""
    import jax

    from flax_vlm import parallel

    parallel.start_processes(address, processes, process)
    outcomes: list[Any] = []
    for breaks in (4, ROWS, ROWS):
        try:
            job = {"n": 1 + process}  # what the first one says is the job
            outcomes.append(make(target, job, process, processes, breaks=breaks))
        except (OSError, IndexError) as error:
            outcomes.append(str(error))
    print(json.dumps(outcomes))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
