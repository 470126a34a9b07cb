"""What a model is made of: every module as a box, as high as it has numbers, with its own modules beside it."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vlm.viz.style import INK, MUTED, SERIES, SIZE, bare, font_for, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEARNS, _FROZEN = "#9fc0ea", "#ebe8e1"
_COLUMN, _LETTER = 1.5, 0.0076  # inches: of a column, and of a letter of one point


def parts(
    params: Mapping[str, Any],
    *,
    learning: Mapping[str, Any] | None = None,
    depth: int = 4,
    title: str = "",
    height: float = 4.4,
) -> "Figure":
    """A tree of parameters from left to right: towers, their stacks, layers, what layers are made of.

    Args:
      params: nested dictionaries of arrays, or of shapes.
      learning: those that learn, as `training.step.split` gives them: as much of each box is coloured.
      depth: columns; what lies deeper is counted in its module.
      height: inches of the whole model.

    Raises:
      ValueError: for no parameters, or others in `learning` than in `params`.
    """
    sizes, learnt = _sizes(params), _sizes(learning or {})
    if not sum(sizes.values()) or depth < 1:
        raise ValueError(f"expected parameters and a depth from 1 on, came {len(sizes)} and {depth}")
    if strangers := learnt.keys() - sizes.keys():
        raise ValueError(f"learning: expected parameters of the model, came {sorted(strangers)[0]}")
    columns = min(depth, max(len(path) for path in sizes))
    figure = new_figure(columns * _COLUMN + 0.2, height + 0.42 * bool(title), title)
    axes: Any = figure.subplots()
    bare(axes)
    axes.set(xlim=(0, columns), ylim=(sum(sizes.values()), 0))
    scale = height / sum(sizes.values())  # inches of a number
    top = 0
    for number, first in enumerate(sorted({path[0] for path in sizes}, key=_in_order)):
        color = _FROZEN if learning is not None else SERIES[number % len(SERIES)]
        top = _draw(axes, (first,), sizes, learnt, columns, top, scale, color)
    if learning is not None:
        whole, some = sum(sizes.values()), sum(learnt.values())
        said = f"{_short(some)} learn, {_short(whole - some)} are frozen"
        axes.set_xlabel(said, loc="left", color=MUTED, fontsize=SIZE, family=font_for(said))
    return figure


def _draw(
    axes: "Axes",
    path: tuple[str, ...],
    sizes: Mapping[tuple[str, ...], int],
    learnt: Mapping[tuple[str, ...], int],
    columns: int,
    top: int,
    scale: float,
    color: str,
) -> int:
    """The box of one module, and of all within it; gives where it ends."""
    from matplotlib.patches import Rectangle

    inside = [each for each in sizes if each[: len(path)] == path]
    size, column = sum(sizes[each] for each in inside), len(path) - 1
    share = sum(learnt.get(each, 0) for each in inside) / max(size, 1)
    pale = 1.0 if color == _FROZEN else 0.62 - 0.12 * column
    x, width = column + 0.006, 0.988
    axes.add_patch(Rectangle((x, top), width, size, facecolor=color, alpha=max(pale, 0.14), edgecolor="none"))
    if share:
        axes.add_patch(Rectangle((x, top), width * share, size, facecolor=_LEARNS, edgecolor="none"))
    axes.plot([x, x + width], [top, top], color="white", linewidth=0.9 if size * scale > 0.05 else 0.2)
    if size * scale > 0.12:
        name, number, middle = path[-1], _short(size), top + size / 2
        letter = min(SIZE - 1, 62 * size * scale, 0.94 * _COLUMN / _LETTER / len(name))
        write(axes, x + 0.03, middle, name, va="center", color=INK, fontsize=letter)
        if (len(name) + len(number) + 2) * letter * _LETTER < _COLUMN:
            write(axes, x + 0.96, middle, number, va="center", ha="right", color=MUTED, fontsize=letter - 1)
    if len(path) < columns:
        at = top
        for child in sorted({each[len(path)] for each in inside if len(each) > len(path)}, key=_in_order):
            at = _draw(axes, (*path, child), sizes, learnt, columns, at, scale, color)
    return top + size


def _in_order(name: str) -> list[tuple[int, str]]:
    """By the alphabet, but layers_2 before layers_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split("([0-9]+)", name)]


def _sizes(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The size of every leaf, by the names on the way to it."""
    found: dict[tuple[str, ...], int] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _sizes(value, (*path, name))
        else:
            found[*path, name] = math.prod(np.shape(value) if not hasattr(value, "shape") else value.shape)
    return found


def _short(number: int) -> str:
    """Three digits or fewer, with k, M or B."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.{1 if number < 10 * unit else 0}f}{name}"
    return str(number)
