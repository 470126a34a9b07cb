"""One step, in a process of its own, on cold files: its seconds and its memory (Linux, from /proc)."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.machine import Watch

SAMPLE_SECONDS = 0.02
ROOT = Path(__file__).parents[2]


class StepFailed(Exception):
    """A step ended with an error."""


@dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
      command: the last line that a step of ours prints is JSON: {"seconds": of its work alone}.
      reads: a folder of which nothing may be in memory when it starts.
      writes: the folder that it writes.
      peer: the step of the same run that one of ours is compared with.
    """

    name: str
    command: Sequence[str | Path]
    reads: Path
    writes: Path | None = None
    peer: str | None = None


@dataclass
class Memory:
    """The most that a process had in memory, in bytes; its children are not counted.

    Attributes:
      peak: all of it, by the kernel's own record.
      cache: pages of files in it, those of program and libraries too, at the highest sample.
      private: the most that was no page of a file.
    """

    peak: int = 0
    cache: int = 0
    private: int = 0
    _highest: int = 0

    def look(self, pid: int) -> None:
        """Takes a sample; of a process that has ended there is none."""
        with contextlib.suppress(OSError, KeyError):
            lines = Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines()
            kb = {name: int(value[:-3]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
            rss, cache = kb["VmRSS"] * 1024, kb["RssFile"] * 1024
            self.peak = max(self.peak, kb["VmHWM"] * 1024)
            self.private = max(self.private, rss - cache)
            if rss > self._highest:
                self._highest, self.cache = rss, cache


@dataclass(frozen=True)
class Measured:
    """What a step took.

    Attributes:
      seconds: from the start of its process until what it wrote is on the disk.
      work_seconds: without the start and the end of Python, and its imports.
      others: the share of all cores that neither the step nor the kernel's own threads had.
    """

    seconds: float
    work_seconds: float
    memory: Memory
    others: float


def measure(step: Step) -> Measured:
    """Runs a step once.

    Raises:
      StepFailed: with the last lines that it printed.
    """
    drop_pages(step.reads)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        printed = out if step.peer else subprocess.DEVNULL  # the output of `cat` is the checkpoint
        start = time.perf_counter()
        with _running(step.command, printed, err) as process, _sampled(process.pid) as memory:
            # Group 0 is the kernel's threads: our pages on their way to the disk.
            without_step, without_kernel, everyone = Watch(process.pid), Watch(0), Watch()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # left as a zombie, which still can be asked
            seconds = time.perf_counter() - start
            others = (without_step.others() or 0.0) + (without_kernel.others() or 0.0) - (everyone.others() or 0.0)
        if process.returncode != 0:
            err.seek(0)
            said = err.read().strip().splitlines()[-5:]
            raise StepFailed("\n".join([f"{step.name} ended with status {process.returncode}:", *said]))
        out.seek(0)
        work = json.loads(out.read().splitlines()[-1])["seconds"] if step.peer else seconds
    start = time.perf_counter()
    if step.writes is not None:
        subprocess.run(["sync", "-f", step.writes], check=True)
    syncing = time.perf_counter() - start
    return Measured(seconds + syncing, work + syncing, memory, max(0.0, others))


def drop_pages(folder: Path) -> None:
    """Takes all files of a folder out of memory, so that reading them again reads the disk."""
    for file in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # only clean pages go
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextlib.contextmanager
def _running(command: Sequence[str | Path], out: IO[str] | int, err: IO[str]) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, which does not outlive the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=_environment(), process_group=0
    )
    try:
        yield process
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        process.wait()


@contextlib.contextmanager
def _sampled(pid: int) -> Iterator[Memory]:
    memory, stop = Memory(), threading.Event()

    def look() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            memory.look(pid)

    sampler = threading.Thread(target=look)
    memory.look(pid)
    sampler.start()
    try:
        yield memory
    finally:
        stop.set()
        sampler.join()


def _environment() -> dict[str, str]:
    """On the CPU unless the caller chose, and without compiled programs of an earlier run."""
    return {"JAX_PLATFORMS": "cpu"} | os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}
