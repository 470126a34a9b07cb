"""Shaded tables: which words count, and every text with every picture.

R rows   C columns   W words
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from flax_vlm.viz.style import INK, MUTED, SHADE, SIGNED, SIZE, as_picture, bare, font_for, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def attention_over_words(
    words: Sequence[str],
    weights: Float[np.ndarray, "R W"] | Float[np.ndarray, " W"],
    *,
    rows: Sequence[str] = (),
    numbers: bool = False,
    title: str = "",
) -> "Figure":
    """The words in a line, each on a ground as dark as it counts; several lines where there are several weightings.

    Args:
      weights: from 0 up, NaN where a word could not be seen (it comes later, say), which leaves its place empty. The
        darkest ground is the largest weight of all lines.
      rows: what stands in front of each line: the word that is written next, say.
      numbers: write each weight, in percent, below its word.

    Raises:
      ValueError: for weights of another shape, or negative ones.
    """
    table = np.atleast_2d(np.asarray(weights, np.float32))
    if table.ndim != 2 or not table.size or table.shape[1] != len(words) or (rows and len(rows) != len(table)):
        raise ValueError(
            f"weights have shape {np.shape(weights)}: expected [{len(rows) or 'rows'}, {len(words)}] for these words"
        )
    if not np.nanmin(table) >= 0:
        raise ValueError(f"weights go down to {np.nanmin(table):.3g}: expected numbers from 0 up")
    letter, line = 0.092, 0.42 if numbers else 0.29  # inches
    label = max((_inches(row) for row in rows), default=0) + 0.3 * bool(rows)
    widths = np.array([max(_inches(word), 3 * letter if numbers else 0) + 0.16 for word in words])
    figure = new_figure(label + widths.sum() + 0.2, len(table) * line + 0.15 + 0.4 * bool(title), title)
    axes: Any = figure.subplots()
    bare(axes)
    axes.set(xlim=(-label, widths.sum()), ylim=(len(table) * line, 0))
    starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
    shades = _shades(table, float(np.nanmax(table)))
    for r, values in enumerate(table):
        middle = (r + (0.38 if numbers else 0.5)) * line
        if rows:
            write(axes, -0.14, middle, rows[r], ha="right", va="center")
        for x, width, word, value, shade in zip(starts, widths, words, values, shades[r], strict=True):
            if np.isnan(value):
                continue
            _box(axes, x, r * line, width, line, shade)
            ink = _ink_on(shade)
            write(axes, x + width / 2, middle, word, ha="center", va="center", color=ink)
            if numbers:
                small = f"{100 * value:.0f}"
                write(axes, x + width / 2, (r + 0.76) * line, small, ha="center", va="center", color=ink, fontsize=6.5)
    return figure


def similarity(
    matrix: Float[np.ndarray, "R C"],
    rows: Sequence[str],
    columns: Sequence[str] = (),
    *,
    images: Sequence[Any] | None = None,
    decimals: int | None = 2,
    highlight: bool = True,
    limits: tuple[float, float] | None = None,
    signed: bool = False,
    title: str = "",
    size: float = 0.62,
) -> "Figure":
    """A matrix as a heat map with its numbers.

    Args:
      rows, columns: what each row and column is; columns may do with pictures alone.
      images: a picture for each column, drawn above it.
      decimals: of the numbers in the cells; None writes none.
      highlight: frames the largest of each column: what a picture is most like.
      limits: the values of the lightest and the darkest ground; by default the smallest and the largest.
      signed: what is below 0 gets another colour, and 0 none.
      size: inches of a column.

    Raises:
      ValueError: for names or pictures that are not as many as rows and columns.
    """
    from matplotlib.patches import Rectangle

    matrix = np.asarray(matrix, np.float32)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(f"the matrix has shape {matrix.shape}: expected [rows, columns] of finite numbers")
    for name, given, expected in (
        ("rows", rows, {matrix.shape[0]}),
        ("columns", columns, {matrix.shape[1]} | ({0} if images is not None else set())),
        ("images", images, {matrix.shape[1]}),
    ):
        if given is not None and len(given) not in expected:
            raise ValueError(f"{name}: expected {max(expected)} for a matrix {matrix.shape}, came {len(given)}")
    low, high = limits or (float(matrix.min()), float(matrix.max()))
    line, label = 0.34, max(map(_inches, rows)) + 0.15
    heights = [0.9 * size] * (images is not None) + [line * len(rows)]
    height = sum(heights) + 0.3 * bool(columns) + 0.42 * bool(title) + 0.12
    figure = new_figure(label + size * matrix.shape[1] + 0.1, height, title)
    grid = figure.add_gridspec(len(heights), matrix.shape[1], height_ratios=heights, hspace=0, wspace=0)
    for i, image in enumerate(images if images is not None else ()):
        axes = figure.add_subplot(grid[0, i])
        axes.imshow(as_picture(image), interpolation="nearest")
        axes.set_anchor("S")
        bare(axes)
    axes = figure.add_subplot(grid[-1, :])
    bare(axes)
    axes.set(xlim=(0, matrix.shape[1]), ylim=(len(rows), 0))
    shades = _signed_shades(matrix, max(-low, high)) if signed else _shades(matrix - low, high - low)
    best = matrix.argmax(0)
    for r, name in enumerate(rows):
        write(axes, -0.12, r + 0.5, name, ha="right", va="center")
        for c in range(matrix.shape[1]):
            _box(axes, c, r, 1, 1, shades[r][c])
            if decimals is not None:
                number = f"{round(float(matrix[r, c]), decimals) + 0.0:.{decimals}f}"  # no -0.00
                ink = _ink_on(shades[r][c])
                write(axes, c + 0.5, r + 0.5, number, ha="center", va="center", color=ink, fontsize=8)
    for c in range(matrix.shape[1]):
        if highlight:
            frame = Rectangle((c, best[c]), 1, 1, fill=False, edgecolor=INK, linewidth=1.6, clip_on=False, zorder=3)
            axes.add_patch(frame)
        if columns:
            axes.text(
                c + 0.5, len(rows) + 0.15, columns[c], ha="center", va="top", color=MUTED, fontsize=SIZE - 1,
                family=font_for(columns[c]),
            )  # fmt: skip
    return figure


def _shades(values: Float[np.ndarray, "R C"], top: float) -> Any:
    """A colour [R, C, 4] for each value; not quite white at 0, so that a cell can be seen."""
    import matplotlib

    share = np.clip(np.nan_to_num(values) / (top or 1.0), 0, 1)
    return matplotlib.colormaps[SHADE](0.03 + 0.85 * share)


def _signed_shades(values: Float[np.ndarray, "R C"], top: float) -> Any:
    """White at 0."""
    import matplotlib

    return matplotlib.colormaps[SIGNED](0.5 + 0.42 * np.clip(values / (top or 1.0), -1, 1))


def _box(axes: "Axes", x: float, y: float, width: float, height: float, color: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5))


def _ink_on(color: Any) -> str:
    """White on what is dark."""
    return INK if float(np.dot(color[:3], (0.299, 0.587, 0.114))) > 0.55 else "white"


def _inches(text: str) -> float:
    """About how wide a text is; letters of Chinese, Japanese and Korean are twice as wide."""
    return 0.092 * sum(1.0 + 0.6 * (ord(letter) > 0x2E7F) for letter in text)
