"""What the machine did at most in this run, and how near other work came to it (the roofline model)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.cases import Phase
from benchmarks.contest import Result

Rows = Sequence[tuple[str, list[Result]]]


class Roofs(NamedTuple):
    """Operations a second by dtype, and bytes a second."""

    flops: Mapping[str, float]
    bandwidth: float | None


class Share(NamedTuple):
    """Of the time that work took, what it needs at least; and what most of that is: arithmetic or memory."""

    share: float
    bound: str


def measured(rows: Rows) -> Roofs:
    """Those of the cases that are roofs: the faster of their contestants."""
    flops, bandwidth = {}, None
    for title, results in rows:
        done = [result.median for result in results if result.seconds]
        if title.startswith("roof:") and done and results[0].phases:
            needed, nbytes, _ = results[0].phases[0]
            if needed:
                flops[results[0].dtype] = needed / min(done)
            else:
                bandwidth = nbytes / min(done)
    return Roofs(flops, bandwidth)


def share(result: Result, ours: Result, roofs: Roofs) -> Share | None:
    """None where nobody said what the work needs, or the roofs were not measured."""
    phases = [Phase(*phase) for phase in result.phases or ours.phases]
    peak = roofs.flops.get(ours.dtype)
    if not result.seconds or not phases or peak is None or roofs.bandwidth is None:
        return None
    arithmetic = sum(each.times * each.flops / peak for each in phases)
    memory = sum(each.times * each.nbytes / roofs.bandwidth for each in phases)
    least = sum(each.times * max(each.flops / peak, each.nbytes / roofs.bandwidth) for each in phases)
    return Share(least / result.median, "arithmetic" if arithmetic > memory else "memory")
