"""What all plots share: colours, fonts, and a figure that shows itself in a notebook.

H height   W width
"""

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1f2433", "#6b7080", "#d9d6ce"
RIGHT, WRONG = "#1f8a70", "#cf3b3b"
SERIES = ("#2f5d9e", "#d9822b", "#1f8a70", "#a2417f", "#7a6a4f", "#5b8fd6", "#cf3b3b", "#6b7080")
# matplotlib's: a table's cells, those below and above zero, and what lies over a picture
SHADE, SIGNED, HEAT = "YlGnBu", "RdBu", "inferno"
SIZE = 9.5  # points, of most texts
DPI = 110
REGULAR = 400  # texts have one weight; colours and frames say what matters

_families: list[str] = []  # in the order in which they came


def use_fonts(folder: str | Path) -> list[str]:
    """Texts are set in the fonts of a folder (.otf, .ttf) from now on, each in the first that has all its characters.

    matplotlib's own font has Latin, Greek and Cyrillic letters, and no Chinese, Japanese or Korean ones.

    Returns:
      The names of the families.

    Raises:
      ValueError: for a folder without fonts.
    """
    from matplotlib import font_manager

    files = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".otf", ".ttf"))
    if not files:
        raise ValueError(f"{folder}: expected .otf or .ttf files, found none")
    for file in files:
        font_manager.fontManager.addfont(file)
        properties = font_manager.ttfFontProperty(font_manager.get_font(file))
        if properties.weight == REGULAR and properties.name not in _families:
            _families.append(properties.name)
    _characters.cache_clear()
    return list(_families)


def font_for(text: str) -> list[str]:
    """The families to set a text in: one that has all of it first, then what a character could still be found in."""
    import matplotlib

    own: list[str] = list(matplotlib.rcParams["font.family"])
    families = [*_families, *own]
    wanted = set(map(ord, text)) - {ord("\n")}
    whole = [family for family in families if wanted <= _characters(family)]
    return list(dict.fromkeys([*whole[:1], *own, *_families]))


@cache
def _characters(family: str) -> frozenset[int]:
    from matplotlib import font_manager

    file = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return frozenset(font_manager.get_font(file).get_charmap())


def write(axes: "Axes", x: float, y: float, text: str, **options: Any) -> Any:
    """`axes.text` in this house's size and ink, in the font that the text needs."""
    options = {"color": INK, "fontsize": SIZE, "family": font_for(text)} | options
    return axes.text(x, y, text, **options)


def new_figure(width: float, height: float, title: str = "") -> "Figure":
    """An empty figure of so many inches."""
    figure = _figure_class()(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=SIZE + 2.5, family=font_for(title))
    return figure


@cache
def _figure_class() -> Any:
    from matplotlib.figure import Figure

    class Plot(Figure):
        """A Figure that notebooks draw without pyplot, which would draw it a second time."""

        def _repr_png_(self) -> bytes:
            drawn, small = io.BytesIO(), io.BytesIO()
            self.savefig(drawn, format="png", dpi=DPI)
            # 256 colours: a third of the bytes in the file of the notebook.
            Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
            return small.getvalue()

    return Plot


def bare(axes: "Axes") -> None:
    """No frame and no ticks."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def framed(axes: "Axes", color: str, width: float = 2.0) -> None:
    """No ticks, and a frame of a colour."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=width)


def as_picture(image: Any) -> Float[np.ndarray, "H W 3"]:
    """RGB from 0 to 1 of a PIL image or an array: [H, W] or [H, W, 3], uint8, or floating and already from 0 to 1.

    Raises:
      ValueError: for any other shape, or numbers out of that range.
    """
    array: Shaped[np.ndarray, "..."] = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"a picture has shape {array.shape}: expected [height, width] or [height, width, 3]")
    if array.dtype == np.uint8:
        return array / np.float32(255)
    if not np.issubdtype(array.dtype, np.floating) or array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"a picture of {array.dtype} goes from {array.min():.3g} to {array.max():.3g}: expected uint8, or floating "
            "numbers from 0 to 1. The processor's pixel_values are normalised: show the picture that went in"
        )
    return array.astype(np.float32)
