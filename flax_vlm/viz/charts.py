"""Lines: how a run learns, and anything else that goes from step to step or from layer to layer.

N points
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from flax_vlm.viz.style import DPI, INK, MUTED, RULE, SERIES, SIZE, font_for, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Sequence[float] | Float[np.ndarray, " N"]


def losses(
    runs: Mapping[str, Line],
    *,
    x: Sequence[float] | None = None,
    smooth: float = 0.9,
    xlabel: str = "step",
    ylabel: str = "loss",
    log: bool = False,
    title: str = "",
    size: tuple[float, float] = (6.6, 3.2),
) -> "Figure":
    """A line for each run: its running mean, over the pale line of the values themselves.

    Args:
      smooth: what of the mean each step keeps; 0 for the values alone. For the rest see `curves`.
    """
    return curves(runs, x=x, smooth=smooth, xlabel=xlabel, ylabel=ylabel, log=log, title=title, size=size)


def curves(
    lines: Mapping[str, Line],
    *,
    x: Sequence[float] | None = None,
    ticks: Sequence[str] = (),
    smooth: float = 0.0,
    spread: Mapping[str, Line] | None = None,
    dotted: Sequence[str] = (),
    xlabel: str = "",
    ylabel: str = "",
    log: bool = False,
    title: str = "",
    size: tuple[float, float] = (6.6, 3.2),
) -> "Figure":
    """Lines, each with its name at its end instead of a legend.

    Args:
      x: where the values stand; 1, 2, ... when absent. A line may be shorter than the others.
      ticks: names for the places, layers say; the values are then dots.
      smooth: draw running means, of which each step keeps so much, over the pale values.
      spread: how far values of a line may be from it, by its name: a pale band so far up and down.
      dotted: the names of lines to draw dotted: what the others are measured by.
      log: a logarithmic scale of values.

    Raises:
      ValueError: for no lines, an empty one, or one longer than `x` or `ticks`.
    """
    if not lines or not all(map(len, lines.values())):
        raise ValueError(
            f"expected lines of at least one value, came { {name: len(of) for name, of in lines.items()} }"
        )
    longest = max(map(len, lines.values()))
    places = np.arange(1, longest + 1) if x is None else np.asarray(x)
    for name, given in (("x", places), ("ticks", ticks)):
        if len(given) < longest and (name == "x" or given):
            raise ValueError(f"{name}: expected {longest} or more, as many as the longest line, came {len(given)}")
    bands = spread or {}
    for name, given in (("dotted", dotted), ("spread", bands)):
        if unknown := set(given) - set(lines):
            raise ValueError(f"{name}: expected names of lines, came {sorted(unknown)}")
    figure = new_figure(*size, title)
    axes: Any = figure.subplots()
    _clean(axes, xlabel, ylabel, log)
    ends = []
    for (name, values), color in zip(lines.items(), _colours(len(lines)), strict=True):
        values = np.asarray(values, np.float64)
        at = places[: len(values)]
        style = {"linestyle": (0, (1, 1.2)) if name in dotted else "-", "color": color, "linewidth": 1.8}
        marks = {"marker": "o", "markersize": 3.6} if ticks else {}
        if smooth:
            axes.plot(at, values, color=color, linewidth=0.7, alpha=0.3)
            values = running_mean(values, smooth)
        if name in bands:
            width = np.asarray(bands[name], np.float64)
            axes.fill_between(at, values - width, values + width, color=color, alpha=0.15, linewidth=0)
        axes.plot(at, values, **style, **marks)
        ends.append((name, values[-1], color))
    if ticks:
        axes.set_xticks(places[: len(ticks)])
        axes.set_xticklabels(ticks, fontsize=SIZE - 1.5, family=font_for("".join(ticks)))
    _name_ends(figure, axes, ends)
    return figure


def running_mean(values: Float[np.ndarray, " N"], keep: float) -> Float[np.ndarray, " N"]:
    """An exponential mean without the pull of its start."""
    kept, weight, means = 0.0, 0.0, []
    for value in values:
        kept, weight = keep * kept + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(kept / weight)
    return np.asarray(means)


def _clean(axes: "Axes", xlabel: str, ylabel: str, log: bool) -> None:
    """Two thin axes and lines to read values by."""
    axes.set_xlabel(xlabel, color=MUTED, fontsize=SIZE, family=font_for(xlabel))
    axes.set_ylabel(ylabel, color=MUTED, fontsize=SIZE, family=font_for(ylabel))
    digits: Any = font_for("0123456789." + "−" * log)  # powers of ten have a minus, which not all fonts do
    axes.tick_params(which="both", colors=MUTED, labelsize=SIZE - 1, length=0, labelfontfamily=digits)
    axes.margins(x=0.015)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    if log:
        axes.set_yscale("log")
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=INK, linewidth=0.8)


def _name_ends(figure: "Figure", axes: "Axes", ends: Sequence[tuple[str, float, str]]) -> None:
    """Writes (name, last value, colour) behind the axes, moved apart where they would lie on each other."""
    figure.draw_without_rendering()  # now the layout and both scales stand
    room = 1.35 * SIZE / 72 * DPI / axes.get_window_extent().height  # of a line of text, as a share of the axes
    to_share = axes.transData + axes.transAxes.inverted()
    wanted = sorted((float(to_share.transform((1, value))[1]), name, color) for name, value, color in ends)
    heights: list[float] = []
    for share, *_ in wanted:
        heights.append(max(share, heights[-1] + room) if heights else share)
    if heights[-1] > 1:  # from the top down again
        heights[-1] = 1.0
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - room)
    widest = 0.0
    for height, (_, name, color) in zip(heights, wanted, strict=True):
        text = write(axes, 1.015, height, name, color=color, va="center", transform=axes.transAxes)
        text.set_in_layout(False)  # the layout is told of all of them, once
        widest = max(widest, text.get_window_extent().width / figure.bbox.width)
    figure.set_layout_engine("constrained", rect=(0, 0, 0.98 - widest, 1))


def _colours(number: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(number)]
