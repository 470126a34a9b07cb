"""Contestants take turns on a machine that is watched."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.device import ENVIRONMENTS, Device
from benchmarks.machine import Watch, cores

# Others may use this share of all cores; a system at rest stays below 2 %.
BUSY = 0.05


class Busy(Exception):
    """The machine was not idle for long enough."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
      rounds: how often every contestant takes a turn.
      turn_seconds: how long a turn lasts; at least one run.
      patience: seconds to wait for an idle machine, and seconds of rounds thrown away in one case, before giving up.
      allow_busy: measure whatever others do.
      device: that of all contestants.
    """

    rounds: int = 7
    turn_seconds: float = 1.5
    patience: float = 120
    allow_busy: bool = False
    quick: bool = False
    device: Device = "cpu"


@dataclasses.dataclass
class Result:
    """One contestant in one case."""

    contestant: str
    error: str | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    prepare_seconds: float = 0.0
    first_call_seconds: float = 0.0
    shape: list[int] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    phases: list[list[float]] = dataclasses.field(default_factory=list)  # flops, bytes, times
    dtype: str = "float32"
    others: float | None = 0.0  # the largest share of the processors that others had during a turn,
    others_at_first: float | None = 0.0  # ... and while it prepared and compiled

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def compile_seconds(self) -> float:
        """What the first call took longer than the others."""
        return max(0.0, self.first_call_seconds - self.median)


class Contestant:
    """The process of one contestant, from our side. Only one of them may work at a time."""

    def __init__(self, module: str, case: Case, name: str, plan: Plan):
        self.result = Result(name)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", module, case.title, name, str(plan.quick)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            cwd=Path(__file__).parents[1],
            env={**_environment(), **ENVIRONMENTS[plan.device], **case.environments.get(name, {})},
            process_group=0,
        )

    def start(self) -> None:
        """Prepare and run once."""
        watch = Watch(self._process.pid)
        for name, value in self._answer().items():
            setattr(self.result, name, value)
        answer = self._answer()
        self.result.others_at_first = watch.others()
        self.result.first_call_seconds, self.result.shape = answer["first_call_seconds"], answer["shape"]
        if not answer["finite"]:
            raise RuntimeError("its output is not finite")

    def turn(self, seconds: float, uncounted: int) -> tuple[list[float], float | None]:
        """The seconds of each counted run in a turn, and the share of the processors that others had meanwhile."""
        watch = Watch(self._process.pid)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds} {uncounted}\n")
        answer = self._answer()
        self.result.peak_bytes = answer["peak_bytes"]
        return answer["seconds"], watch.others()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            lines = self._log.read().strip().splitlines() or [f"it ended with status {self._process.returncode}"]
            raise RuntimeError(lines[-1])
        return json.loads(line)


def run_case(module: str, case: Case, plan: Plan) -> list[Result]:
    """Every contestant of a case; one that cannot run has its error in its result.

    Raises:
      Busy: when the machine does not come to rest.
    """
    with contextlib.ExitStack() as stack:
        contestants, running = [], []
        for name in case.contestants:
            if not plan.allow_busy:
                wait_until_idle(plan.patience)
            _note(f"{case.title}: {name} starts")
            contestant = Contestant(module, case, name, plan)
            stack.callback(contestant.close)
            contestants.append(contestant)
            try:
                contestant.start()
                running.append(contestant)
            except RuntimeError as error:
                contestant.result.error = str(error)
        if len(shapes := {tuple(contestant.result.shape) for contestant in running}) > 1:
            raise RuntimeError(f"{case.title}: the contestants' outputs differ in shape: {sorted(shapes)}")
        _alternate(case, running, plan)
        return [contestant.result for contestant in contestants]


def _alternate(case: Case, contestants: list[Contestant], plan: Plan) -> None:
    """Round after round, until enough of them were undisturbed."""
    kept, lost = 0, 0.0
    seconds = plan.turn_seconds if plan.quick else max(plan.turn_seconds, case.turn_seconds)
    uncounted = int(case.turn_seconds > 0)
    while kept < plan.rounds and contestants:
        if not plan.allow_busy:
            wait_until_idle(plan.patience)
        start = time.monotonic()
        turns = [contestant.turn(seconds, uncounted) for contestant in contestants]
        others = max(share or 0.0 for _, share in turns)
        if others > BUSY and not plan.allow_busy:
            lost += time.monotonic() - start
            _note(f"{case.title}: a round is thrown away, others used {others:.0%} of the processors")
            if lost > plan.patience:
                raise Busy(f"others used {others:.0%} of the processors, again and again")
            continue
        kept += 1
        _note(f"{case.title}: round {kept} of {plan.rounds}")
        for contestant, (times, share) in zip(contestants, turns, strict=True):
            result = contestant.result
            result.seconds += times
            result.others = None if share is None or result.others is None else max(share, result.others)


def wait_until_idle(patience: float) -> None:
    """Returns after a second in which nobody used the processors.

    Raises:
      Busy: when that does not happen in `patience` seconds.
    """
    end = time.monotonic() + patience
    while True:
        watch = Watch()
        time.sleep(1)
        others = watch.others()
        if others is None or others <= BUSY:
            return
        if time.monotonic() > end:
            raise Busy(f"others use {others:.0%} of the processors")


def _environment() -> dict[str, str]:
    """All cores for everyone, and no compiled program from an earlier run."""
    return os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "OMP_NUM_THREADS": str(cores()),
    }


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
