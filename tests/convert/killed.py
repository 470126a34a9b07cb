"""Conversions in processes of their own, which die when they are told to."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# A server that has everything imported, and forks for each conversion: a start takes no time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flax_vlm.convert.port", "orbax.checkpoint", "tensorstore"])

_AUDITED = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


TIMESTAMPS = {"init_timestamp_nsecs", "commit_timestamp_nsecs"}  # of Orbax, in params/_CHECKPOINT_METADATA


class Done(NamedTuple):
    """What a conversion that was not killed says of itself."""

    moved: Any
    written: list[str]  # the tensors, one entry a block
    steps: list[str]


class Conversion:
    """`flax_vlm.convert.<function>(source, target, **options)` in another process, where each tensor is noted.

    It kills itself before its `step`-th step: a block, a write or flush of Python's, or a file beside or in the target
    that is opened, made, renamed or removed.
    """

    def __init__(self, function: str, source: Path, target: Path, step: int = 0, **options: Any) -> None:
        self._results, sender = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_convert, args=(sender, function, source, target, step, options))
        self.process.start()
        sender.close()

    def outcome(self) -> Done | Exception | None:
        """What it returned or raised; None where it was killed."""
        try:
            return self._results.recv()
        except EOFError:
            self.process.join()
            assert self.process.exitcode == -signal.SIGKILL, f"died of itself: {self.process.exitcode}"
            return None
        finally:
            self.process.join()


def contents(folder: Path) -> dict[str, Any]:
    """Every file, byte by byte, but for the times in Orbax's notes."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name in files.keys() & {"params/_CHECKPOINT_METADATA"}:
        files[name] = {key: value for key, value in json.loads(files[name]).items() if key not in TIMESTAMPS}
    return files


def _convert(sender: Any, function: str, source: Path, target: Path, step: int, options: Any) -> None:
    from flax_vlm import convert
    from flax_vlm.convert import stream

    count, steps, written = itertools.count(1), [], []

    def take(what: str) -> None:
        steps.append(what)
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and (str(arguments[0]).startswith(str(target.parent)) or _in_a_tree(event, arguments)):
            take(event)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            take(function.__name__)
            return function(*arguments)

        return call

    def progress(at: Any) -> None:
        written.append(at.tensor)
        take("block")

    stream.GROUP = 1  # byte
    os.fsync, os.pwrite = counted(fsync), counted(os.pwrite)
    sys.addaudithook(watch)
    try:
        result = Done(getattr(convert, function)(source, target, progress=progress, **options), written, steps)
    except Exception as error:
        result = error
    sender.send(result)


def fsync(_: int) -> None:
    """None: what a killed process wrote is with the system, and a disk takes its time."""


def _in_a_tree(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether this is shutil.rmtree at work, which names files by the descriptor of their folder."""
    return event in ("os.remove", "os.rmdir") and arguments[1] != -1
