"""The table and its JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.contest import BUSY
from benchmarks.conversion.contest import Plan, Row
from benchmarks.conversion.measure import Measured
from benchmarks.conversion.names import Model

HEADER = (
    "step",
    "seconds",
    "GB/s",
    "ratio",
    "without start-up",
    "peak memory",
    "page cache in it",
    "without page cache",
)


def as_json(machine: dict[str, Any], model: Model, plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "machine": machine,
        "model": {"name": model.name, "bytes": model.nbytes, "tensors": len(model.tensors)},
        "plan": {**dataclasses.asdict(plan), "workdir": str(plan.workdir)},
        "steps": [
            {
                "name": row.step.name,
                "peer": row.step.peer,
                "skipped": row.skipped,
                "ratio": ratio(row, rows),
                "runs": [dataclasses.asdict(run) for run in row.runs],
            }
            for row in rows
        ],
    }


def as_markdown(machine: dict[str, Any], model: Model, plan: Plan, rows: Sequence[Row]) -> str:
    """One line a step; where others were at work it says so."""
    lines = [
        f"{model.name}: {len(model.tensors)} tensors, {model.nbytes / 1e9:.2f} GB of bfloat16. {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gb']} GB; commit {machine['commit']}; {machine['date']}. "
        f"Medians of {plan.rounds} rounds in turn, files not in memory at the start.",
        "",
    ]
    if any(run.others > BUSY for row in rows for run in row.runs):
        lines += [f"**The machine was busy (others had over {BUSY:.0%} of it): these times do not compare.**", ""]
    lines += [_line(HEADER), _line(["---", *["---:"] * (len(HEADER) - 1)])]
    return "\n".join([*lines, *(_line(_cells(model, row, rows)) for row in rows)])


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """The median time of a step over that of its peer."""
    peer = next((other for other in rows if other.step.name == row.step.peer), None)
    return row.seconds / peer.seconds if peer and peer.runs and row.runs else None


def _cells(model: Model, row: Row, rows: Sequence[Row]) -> list[str]:
    if not row.runs:
        return [row.step.name, f"not measured: {row.skipped}", *[""] * (len(HEADER) - 2)]
    compared = ratio(row, rows)
    worst: Measured = max(row.runs, key=lambda run: run.memory.peak)
    busy = max(run.others for run in row.runs)
    return [
        row.step.name,
        f"{row.seconds:.2f}" + (f" (busy: {busy:.0%})" if busy > BUSY else ""),
        f"{model.nbytes / row.seconds / 1e9:.2f}",
        f"{compared:.2f}x {row.step.peer}" if compared is not None else "",
        f"{statistics.median(run.work_seconds for run in row.runs):.2f}" if row.step.peer else "",
        *(f"{part / 1e9:.2f} GB" for part in (worst.memory.peak, worst.memory.cache, worst.memory.private)),
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
