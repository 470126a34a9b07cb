"""The machine: what it is, and who uses its processors while we measure (Linux, from /proc)."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
_PROC = Path("/proc")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, versions, commit and date."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _field("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gb": round(int((_field("meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "system": platform.platform(),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def headline() -> str:
    """What a table of results, not of times, says of where it comes from."""
    import jax

    about = describe()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['cpu']}, {jax.default_backend()}; {versions}; commit {about['commit']}; {about['date']}"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Watch:
    """How much of the processors is used by others than one process group, since the watch was started.

    Everything outside the group counts: other people's processes, time that a host machine takes away, and our own
    contestants who should be waiting.
    """

    def __init__(self, group: int | None = None):
        self.group = group
        self.start = time.perf_counter(), _busy_seconds(), _group_seconds(group)

    def others(self) -> float | None:
        """Their share of all cores, 0 to 1; None where the system does not tell."""
        start, busy, own = self.start
        now = _busy_seconds()
        if busy is None or now is None:
            return None
        used = (now - busy) - (_group_seconds(self.group) - own)
        return max(0.0, used / ((time.perf_counter() - start) * (os.cpu_count() or 1)))


def _busy_seconds() -> float | None:
    """Processor seconds that were not idle, over all cores, since the machine started."""
    if not (_PROC / "stat").exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, (_PROC / "stat").read_text("ascii").split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _group_seconds(group: int | None) -> float:
    """Processor seconds of the processes of a group and of their children that have ended."""
    ticks = 0
    for path in _PROC.glob("[0-9]*/stat") if group is not None else ():
        try:
            fields = path.read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _field(file: str, name: str) -> str | None:
    """The first value of `name` in a file of "name : value" lines."""
    path = _PROC / file
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _commit() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
