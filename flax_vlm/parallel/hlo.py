"""What devices send each other in a compiled program, read from its text (HLO, as `Compiled.as_text()` gives it)."""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(ENTRY )?%(?P<name>[\w.-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%[\w.-]+ = (?P<shape>.*?) (?P<opcode>[a-z][a-z-]*)\((?P<rest>.*)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)")
_LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"(pred|[a-z]+[0-9]+)\w*\[([0-9,]*)\]")


class Collective(NamedTuple):
    """One exchange. `nbytes` is the whole array, of which each of `devices` in a group has, or gets, a part."""

    kind: str
    nbytes: int
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together, if they go around in a ring."""
        ways = {"all-reduce": 2.0, "collective-permute": self.devices / max(1, self.devices - 1)}.get(self.kind, 1.0)
        return self.times * ways * self.nbytes * (self.devices - 1) / self.devices


def collectives(text: str) -> list[Collective]:
    """All exchanges of a program; loops count as often as their condition says, or once where it does not."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    found: dict[str, Collective] = {}
    for name, lines in bodies.items():
        for line in lines if times[name] else ():
            match = _INSTRUCTION.match(line)
            kind = match and match["opcode"].removesuffix("-start")
            if not match or kind not in KINDS:
                continue
            whole = _nbytes(match["shape"], pick_largest=match["opcode"] == "all-gather-start")
            devices = _group(match["rest"])
            if kind == "reduce-scatter":
                whole *= devices
            elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # so the TPU's compiler writes it, as a sum of which each takes a part
            # One that runs beside other work stands in its start, in its end and in that work, with one channel.
            channel = re.search(r"channel_id=([0-9]+)", match["rest"])
            found.setdefault(channel[1] if channel else line, Collective(kind, whole, devices, times[name]))
    return [each for each in found.values() if each.devices > 1]


def by_kind(found: list[Collective]) -> dict[str, tuple[int, float]]:
    """Kind -> how many exchanges, and the bytes that each device sends in them."""
    kinds: dict[str, tuple[int, float]] = {}
    for each in found:
        count, sent = kinds.get(each.kind, (0, 0.0))
        kinds[each.kind] = count + each.times, sent + each.sent
    return kinds


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the one that is run."""
    bodies: dict[str, list[str]] = defaultdict(list)
    entry = name = ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start["name"]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line)
    if not entry:
        raise ValueError("no ENTRY in this text: expected HLO, as Compiled.as_text() gives it")
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            called = _CALLED.findall(line)
            for listed in _LISTED.findall(line):
                called += [each.strip().lstrip("%") for each in listed.split(",")]
            condition = re.search(r"condition=%([\w.-]+)", line)
            trips = _trips(bodies[condition[1]]) if condition else 1
            calls[name] += [(each, trips) for each in called if each in bodies]
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for called, _ in calls[name]:
                visit(called)
            order.append(name)

    visit(entry)
    times = Counter({entry: 1})
    for name in reversed(order):  # callers first
        for called, trips in calls[name]:
            times[called] += times[name] * trips
    return times


def _trips(condition: list[str]) -> int:
    """How often a loop runs whose condition counts up to a constant; 1 for another."""
    constants = [int(each) for line in condition for each in re.findall(r"= s32\[\]\S* constant\(([0-9]+)\)", line)]
    return max(constants, default=1)


def _nbytes(shape: str, pick_largest: bool) -> int:
    """Of an array, or of all in a tuple."""
    sizes = []
    for dtype, axes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub("[a-z]", "", dtype))
        sizes.append(math.prod(int(axis) for axis in axes.split(",") if axis) * bits // 8)
    return max(sizes) if pick_largest else sum(sizes)


def _group(attributes: str) -> int:
    """How many devices exchange with each other: written as a mesh and its axes, as two factors, or one by one."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"('\w+')=([0-9]+)", mesh[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'\w+'", mesh[2]))
    factors = re.search(r"replica_groups=\[([0-9]+),([0-9]+)\]<=", attributes)
    if factors:
        return int(factors[2])
    listed = re.search(r"replica_groups=\{\{([0-9,]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    return 2 if "source_target_pairs" in attributes else 1
