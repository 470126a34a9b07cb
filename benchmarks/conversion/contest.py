"""A run: ours and the peers take turns on one checkpoint, in a folder that vanishes with the run."""

import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.contest import wait_until_idle
from benchmarks.conversion import COPY, EXPORTED, NATIVE, PYTORCH
from benchmarks.conversion.measure import Measured, Step, measure
from benchmarks.conversion.names import Model
from benchmarks.conversion.synthetic import make_checkpoint

CHOICES = ("convert", "load", "export")
COPYING, READING = "cp and sync", "reading once"  # the peers


class NoRoom(Exception):
    """The disk is too small for the run."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
      steps: some of CHOICES; loading and exporting need a native checkpoint, so that there is always a conversion.
      shard_size: of PyTorch's files, such as "5GB".
      workdir: where the folder of the run is made.
      patience: seconds to wait for an idle machine before each step.
      allow_busy: do not wait.
    """

    steps: Sequence[str] = CHOICES
    rounds: int = 3
    shard_size: str = "5GB"
    workdir: Path = Path("build")
    patience: float = 120
    allow_busy: bool = False


@dataclass
class Row:
    """All that was measured of a step; or why nothing was."""

    step: Step
    runs: list[Measured] = field(default_factory=list)
    skipped: str = ""

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(run.seconds for run in self.runs)


def run(model: Model, plan: Plan) -> list[Row]:
    """Measures every step of a plan, round after round.

    Raises:
      NoRoom: before anything is written.
      StepFailed: when a step ends with an error.
      benchmarks.contest.Busy: when the machine does not come to rest.
    """
    plan.workdir.mkdir(parents=True, exist_ok=True)
    check_room(model, plan)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=plan.workdir.resolve()) as name:
        folder = Path(name)
        _note(f"making a checkpoint of {model.nbytes:,} bytes")
        make_checkpoint(folder / PYTORCH, model, shard_size=plan.shard_size)
        rows = [Row(step) for step in _steps(folder, plan)]
        for turn in range(plan.rounds):
            for row in rows:
                if row.step.peer == READING and (reason := _too_little_memory(model)):
                    row.skipped = reason
                    continue
                if not plan.allow_busy:
                    wait_until_idle(plan.patience)
                _note(f"round {turn + 1} of {plan.rounds}: {row.step.name}")
                row.runs.append(measure(row.step))
                if row.step.writes in (folder / COPY, folder / EXPORTED):
                    _remove(row.step.writes)
            _remove(folder / NATIVE)
    return rows


def check_room(model: Model, plan: Plan) -> None:
    """Raises NoRoom where a checkpoint, its native form and, with it, an exported one would not fit on the disk."""
    needed = int(model.nbytes * (3.2 if "export" in plan.steps else 2.2))
    free = shutil.disk_usage(plan.workdir).free
    if needed > free:
        raise NoRoom(
            f"{plan.workdir.resolve()}: {needed:,} bytes are needed, {free:,} are free, {needed - free:,} are missing. "
            "Make room, or choose another --workdir or a smaller --size"
        )


def _steps(folder: Path, plan: Plan) -> list[Step]:
    """In the order of a round, each peer before those that are compared with it."""
    pytorch, copy, native, exported = (folder / name for name in (PYTORCH, COPY, NATIVE, EXPORTED))
    ours = (sys.executable, "-m", "benchmarks.conversion.worker")
    steps = [
        Step(COPYING, ("cp", "-r", "--reflink=never", "--sparse=never", pytorch, copy), pytorch, copy),
        Step("convert", (*ours, "convert", folder), pytorch, native, COPYING),
    ]
    if "export" in plan.steps:
        steps.append(Step("export", (*ours, "export", folder, plan.shard_size), native, exported, COPYING))
    if "load" in plan.steps:
        steps += [
            Step(READING, ("cat", *sorted(pytorch.iterdir())), pytorch),
            Step("load PyTorch's files", (*ours, "load_pytorch", folder), pytorch, peer=READING),
            Step("load native files", (*ours, "load_native", folder), native, peer=READING),
        ]
    return steps


def _too_little_memory(model: Model) -> str:
    """Why a loaded model would not fit; "" where it does."""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    needed = int(model.nbytes * 1.1) + (1 << 30)
    return f"{needed / 1e9:.0f} GB of memory needed, {available / 1e9:.0f} available" if needed > available else ""


def _remove(folder: Path) -> None:
    """Removes a folder, and waits until the disk knows: the next step is not to pay for it."""
    shutil.rmtree(folder)
    subprocess.run(["sync", "-f", folder.parent], check=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
