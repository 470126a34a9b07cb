"""The table and its JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import roof
from benchmarks.contest import BUSY, Plan, Result

HEADER = ("case", "contestant", "median", "middle half", "ours is faster", "of the roof", "compile", "peak memory")


def as_json(machine: dict[str, Any], plan: Plan, rows: Sequence[tuple[str, list[Result]]]) -> dict[str, Any]:
    """Everything that was measured; "ratio" is the contestant's time over ours, "roof" the share of the machine's."""
    roofs = roof.measured(rows)
    return {
        "machine": machine,
        "plan": dataclasses.asdict(plan),
        "busy": disturbed(rows),
        "roofs": roofs._asdict(),
        "cases": [
            {"title": title, "results": [_numbers(result, results[0], roofs) for result in results]}
            for title, results in rows
        ],
    }


def as_markdown(machine: dict[str, Any], plan: Plan, rows: Sequence[tuple[str, list[Result]]]) -> str:
    """One line a contestant, after a line about the machine; where others were at work it says so."""
    roofs = roof.measured(rows)
    gpu = f"{machine['gpu']}; " if machine.get("gpu") else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {gpu}{versions}; "
        f"commit {machine['commit']}; {machine['date']}. Medians over {plan.rounds} alternating rounds.",
        "",
    ]
    if plan.quick:
        lines += ["**Tiny sizes: this shows that everything runs, not how fast.**", ""]
    if disturbed(rows):
        lines += [f"**The machine was busy (others had over {BUSY:.0%} of it): these times do not compare.**", ""]
    if any(result.others is None for _, results in rows for result in results):
        lines += ["**Nobody checked that the machine was idle: there is no /proc here.**", ""]
    lines += [_line(HEADER), _line(["---", "---", *["---:"] * (len(HEADER) - 2)])]
    for title, results in rows:
        lines += [_line(_cells(title, result, results[0], roofs)) for result in results]
    return "\n".join(lines)


def disturbed(rows: Sequence[tuple[str, list[Result]]]) -> bool:
    """Whether others used the processors in any turn that counts."""
    return any((result.others or 0.0) > BUSY for _, results in rows for result in results)


def _numbers(result: Result, ours: Result, roofs: roof.Roofs) -> dict[str, Any]:
    numbers = dataclasses.asdict(result)
    if result.seconds:
        numbers |= {"median_seconds": result.median, "compile_seconds": result.compile_seconds}
        numbers["ratio"] = result.median / ours.median if ours.seconds else None
        found = roof.share(result, ours, roofs)
        numbers["roof"] = None if found is None else found._asdict()
    return numbers


def _cells(title: str, result: Result, ours: Result, roofs: roof.Roofs) -> list[str]:
    if result.error is not None:
        return [title, result.contestant, f"failed: {result.error}".replace("|", "/"), *[""] * (len(HEADER) - 3)]
    times = result.seconds * 2 if len(result.seconds) == 1 else result.seconds
    under = roof.share(result, ours, roofs)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return [
        title,
        result.contestant,
        _time(result.median) + _busy(result.others),
        f"{_time(low)} to {_time(high)}",
        f"{result.median / ours.median:.2f}x" if ours.seconds and result is not ours else "",
        "" if under is None else f"{under.share:.0%}, {under.bound}",
        f"{result.compile_seconds:.1f} s{_busy(result.others_at_first)}",
        f"{result.peak_bytes / 1e9:.1f} GB",
    ]


def _busy(others: float | None) -> str:
    return f" (busy: {others:.0%})" if (others or 0.0) > BUSY else ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds < 10 else f"{seconds:.3g} s"
