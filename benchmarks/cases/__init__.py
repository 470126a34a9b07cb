"""What is measured. Each module here has `cases(quick) -> list[Case]`; `MODULES` gives their order in the table."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

MODULES = ("roofs", "checkpoints", "vision_tower", "generation", "train_step", "data", "start_up")
UNDER_ROOFS = {"vision_tower", "generation", "train_step"}  # those that know what they need at least


class Phase(NamedTuple):
    """What work needs at least: arithmetic and memory that is read and written, so many times one after the other."""

    flops: float = 0
    nbytes: float = 0
    times: float = 1


class Work(NamedTuple):
    """What a contestant does over and over.

    Those of ours that say in `phases` what it needs, computing in `dtype`, are seen under the roofs of the machine, and
    with them their peers.
    """

    run: Callable[[], Any]  # once; returns when the result is there, not when it is on its way
    as_numpy: Callable[[Any], np.ndarray]  # that result, to see that all contestants made the same thing; not timed
    phases: tuple[Phase, ...] = ()
    dtype: str = "float32"


class Case(NamedTuple):
    """One row of the table: contestants by name, ours first.

    A contestant is a function that prepares its work (imports, weights, inputs) in its own process. It must not run it:
    the first run is timed as well, because it compiles.
    """

    title: str
    contestants: Mapping[str, Callable[[], Work]]
    environments: Mapping[str, Mapping[str, str]] = {}  # what is added to that of a contestant's process
    # Where work is never done just once: a turn lasts at least so long, after a first run that is not counted, which
    # finds that the system has given the memory between two runs to others.
    turn_seconds: float = 0


def cases(module: str, quick: bool) -> list[Case]:
    """The cases of one of `MODULES`; with `quick` so small that they only show that all runs."""
    return importlib.import_module(f"{__name__}.{module}").cases(quick)
