"""The tensors of released checkpoints: names and shapes, kept in `benchmarks/names/`; configs are the command line's.

A line there is a tensor: its name, then its shape. The indented lines under "model.layers.* x32 num_hidden_layers" are
the tensors of a layer, of which there are 32; the last word is the entry of config.json that says so.
"""

import copy
import functools
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "names"
CONFIGS = Path(__file__).parents[2] / "flax_vlm" / "cli" / "presets"
ITEMSIZE = 2  # bfloat16, in which all of them are released or commonly kept

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """Layers that are alike, or (without a prefix) the tensors that stand between two such stacks."""

    prefix: str
    count: int
    entry: str | None
    layer: dict[str, Shape]

    def cut(self, share: Fraction) -> "Stack":
        """Its first layers. One at least where config.json counts them; where it does not, their number follows from
        another stack's, and rounding down is what keeps both in step."""
        if not self.prefix:
            return self
        return replace(self, count=max(1 if self.entry else 0, math.floor(self.count * share)))

    def names(self) -> dict[str, Shape]:
        if not self.prefix:
            return self.layer
        return {f"{self.prefix}{i}.{name}": shape for i in range(self.count) for name, shape in self.layer.items()}


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds."""

    name: str
    config: dict[str, Any]
    stacks: Sequence[Stack]

    @cached_property
    def tensors(self) -> dict[str, Shape]:
        """Name -> shape, in the order of the state dict."""
        return {name: shape for stack in self.stacks for name, shape in stack.names().items()}

    @property
    def nbytes(self) -> int:
        return sum(map(math.prod, self.tensors.values())) * ITEMSIZE

    def cut(self, nbytes: int) -> "Model":
        """The largest model of at most `nbytes` that keeps one share of the layers of every stack, counted from the
        first, and all tensors outside of the stacks.

        Raises:
          ValueError: when not even a model of a few layers fits.
        """
        layers = [stack for stack in self.stacks if stack.prefix]
        # What config.json does not count follows from what it does: whole layers of the one are whole of the other.
        counts = {stack.count for stack in layers if not stack.entry} or {stack.count for stack in layers}
        smallest = self.nbytes
        for share in sorted({Fraction(kept, count) for count in counts for kept in range(1, count + 1)}, reverse=True):
            stacks = [stack.cut(share) for stack in self.stacks]
            if not all(stack.count for stack in stacks):
                break
            model = Model(self.name, _counted(self.config, stacks), stacks)
            smallest = model.nbytes
            if smallest <= nbytes:
                return model
        raise ValueError(f"{self.name} cut to {nbytes:,} bytes: at least {smallest:,} were expected")


def available() -> list[str]:
    """The models that `read` knows."""
    return sorted(file.stem for file in FOLDER.glob("*.txt"))


def read(name: str) -> Model:
    """One of the `available` models."""
    stacks: list[Stack] = []
    for line in (FOLDER / f"{name}.txt").read_text("ascii").splitlines():
        words = line.split()
        if line.startswith("#"):
            continue
        if words[0].endswith(".*"):
            stacks.append(Stack(words[0][:-1], int(words[1][1:]), (words[2:] or [None])[0], {}))
            continue
        if not stacks or bool(stacks[-1].prefix) != line.startswith(" "):
            stacks.append(Stack("", 1, None, {}))
        stacks[-1].layer[words[0]] = tuple(map(int, words[1:]))
    return Model(name, json.loads((CONFIGS / f"{name.lower()}.json").read_text("ascii")), stacks)


def _counted(config: dict[str, Any], stacks: Sequence[Stack]) -> dict[str, Any]:
    """`config` with as many layers as `stacks`."""
    config = copy.deepcopy(config)
    for stack in stacks:
        if stack.entry:
            *parents, key = stack.entry.split(".")
            functools.reduce(operator.getitem, parents, config)[key] = stack.count
    return config
