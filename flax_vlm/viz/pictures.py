"""Pictures in rows, and heat over pictures.

A pictures   H height   W width   h, w rows and columns of a heat map
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from flax_vlm.viz.style import HEAT, INK, MUTED, RIGHT, RULE, SIZE, WRONG, as_picture, font_for, framed, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FINE = 256  # a heat map is enlarged to so many pixels, so that it is smooth


def gallery(
    images: Sequence[Any],
    titles: Sequence[str] = (),
    *,
    columns: int = 8,
    rows: Sequence[str] = (),
    right: Sequence[bool] | None = None,
    title: str = "",
    size: float = 1.0,
) -> "Figure":
    """Pictures [H, W], [H, W, 3] or of PIL, line by line.

    Args:
      titles: what stands above each.
      columns: pictures a line.
      rows: what stands in front of each line: the query whose answers are ranked in it, say.
      right: frames each in green or red.
      size: inches of a picture.

    Raises:
      ValueError: for no picture, or titles and marks of another number.
    """
    if not len(images):
        raise ValueError("expected at least one picture, came none")
    for name, given in (("titles", titles), ("right", right)):
        if given is not None and len(given) not in ({0, len(images)} if name == "titles" else {len(images)}):
            raise ValueError(f"{name}: expected {len(images)}, one a picture, came {len(given)}")
    columns = min(columns, len(images))
    lines = math.ceil(len(images) / columns)
    if rows and len(rows) != lines:
        raise ValueError(f"rows: expected {lines}, one a line of {columns} pictures, came {len(rows)}")
    label = 0.085 * max(map(_width, rows), default=0)  # inches
    figure = new_figure(columns * size + label, lines * (size + 0.24 * bool(titles)) + 0.42 * bool(title), title)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(images):
            axes.set_axis_off()
            continue
        color = RULE if right is None else RIGHT if right[number] else WRONG
        _show(axes, images[number], titles[number] if titles else "", frame=color, ink=INK if right is None else color)
        if rows and number % columns == 0:
            text = rows[number // columns]
            axes.set_ylabel(text, rotation=0, ha="right", va="center", color=INK, fontsize=SIZE, family=font_for(text))
    return figure


def overlay(
    image: Any,
    heat: Float[np.ndarray, "h w"] | Sequence[Float[np.ndarray, "h w"]],
    *,
    titles: Sequence[str] | str = (),
    notes: Sequence[str] = (),
    columns: int = 8,
    peak: float | None = None,
    strength: float = 0.8,
    plain: bool = True,
    title: str = "",
    size: float = 1.35,
) -> "Figure":
    """Heat over a picture, or several heat maps beside each other, each over the picture or over one of its own.

    Where there is no heat the picture shows as it is. All maps are drawn on one scale, so that they can be compared.

    Args:
      image: one picture, or a list of one for each heat map.
      heat: from 0 up; any number of rows and columns, patches say.
      titles: what stands above each map: the word that was attended from.
      notes: what stands below each.
      peak: the heat that is drawn in full; by default the largest there is.
      strength: how much of the picture it covers, from 0 to 1.
      plain: put the picture itself in front, where there is only one.

    Raises:
      ValueError: for heat that is negative, not finite or of other shapes, or a number of pictures, titles or notes
        that is not that of the maps.
    """
    maps = [np.asarray(each, np.float32) for each in ([heat] if getattr(heat, "ndim", 0) == 2 else heat)]
    titles = [titles] if isinstance(titles, str) else list(titles)
    pictures = list(image) if isinstance(image, list | tuple) else [image] * len(maps)
    for each in maps:
        if each.ndim != 2 or not each.size or not np.isfinite(each).all() or each.min() < 0:
            raise ValueError(f"heat of shape {each.shape}: expected [rows, columns] of finite numbers from 0 up")
    for name, given, allowed in (
        ("images", pictures, {len(maps)}),
        ("titles", titles, {0, len(maps)}),
        ("notes", notes, {0, len(maps)}),
    ):
        if not maps or len(given) not in allowed:
            raise ValueError(f"{name}: expected one for each of {len(maps)} heat maps, came {len(given)}")
    top = max(float(each.max()) for each in maps) if peak is None else peak
    alone = plain and not isinstance(image, list | tuple)
    number = len(maps) + alone
    columns = min(columns, number)
    lines = math.ceil(number / columns)
    texts = 0.24 * bool(titles) + 0.22 * bool(notes)
    figure = new_figure(columns * size + 0.62, lines * (size + texts) + 0.42 * bool(title), title)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    cells = iter(grid.flat)
    if alone:
        _show(next(cells), image, "picture" if titles else "", frame=RULE, ink=MUTED)
    for i, (each, picture) in enumerate(zip(maps, pictures, strict=True)):
        axes = next(cells)
        shape = _show(axes, picture, titles[i] if titles else "", frame=RULE, ink=INK)
        axes.imshow(_colours(each, top, strength), extent=(-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5))
        if notes:
            axes.set_xlabel(notes[i], color=MUTED, fontsize=SIZE - 1.5, family=font_for(notes[i]), labelpad=3)
    for axes in cells:
        axes.set_axis_off()
    _scale(figure, grid, top)
    return figure


def _show(axes: "Axes", image: Any, title: str, *, frame: str, ink: str) -> tuple[int, ...]:
    """One picture; gives its shape."""
    picture = as_picture(image)
    axes.imshow(picture, interpolation="nearest" if max(picture.shape) <= 64 else "antialiased")
    framed(axes, frame, 1.0 if frame == RULE else 2.0)
    if title:
        axes.set_title(title, color=ink, fontsize=SIZE, family=font_for(title), pad=4)
    return picture.shape


def _colours(heat: Float[np.ndarray, "h w"], top: float, strength: float) -> Float[np.ndarray, "H W 4"]:
    """The map enlarged, as colours that are the more opaque the hotter they are."""
    import matplotlib

    scale = _FINE // max(heat.shape) or 1
    large = Image.fromarray(heat).resize((heat.shape[1] * scale, heat.shape[0] * scale), Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(large) / (top or 1.0), 0, 1)
    colours = matplotlib.colormaps[HEAT](0.15 + 0.85 * share)
    colours[..., 3] = strength * share**0.6
    return colours


def _scale(figure: "Figure", grid: Any, top: float) -> None:
    """What the colours mean, at the right."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, top), HEAT), ax=grid, fraction=0.05, pad=0.015, aspect=22)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    digits: Any = font_for("0123456789.")
    bar.ax.tick_params(labelsize=SIZE - 2, colors=MUTED, length=0, labelfontfamily=digits)
    bar.ax.locator_params(nbins=4)


def _width(text: str) -> int:
    """In letters; those of Chinese, Japanese and Korean take two."""
    return max(sum(1 + (ord(letter) > 0x2E7F) for letter in line) for line in text.split("\n"))
