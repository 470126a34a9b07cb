"""Figures hold what they were given, in fonts that have it, and say what is wrong with anything else."""

import io
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_vlm import viz
from flax_vlm.viz import style
from flax_vlm.viz.charts import running_mean

FONTS = Path(__file__).parents[2] / "examples" / "altclip-digits" / "fonts"
PICTURE = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.fixture
def fonts(monkeypatch):
    monkeypatch.setattr(style, "_families", [])
    return viz.use_fonts(FONTS)


def test_a_figure_shows_itself_as_a_png_and_pyplot_knows_nothing_of_it():
    import matplotlib.pyplot as plt

    figure = viz.gallery([PICTURE] * 3, ["a", "b", "c"], title="three")
    assert not plt.get_fignums()
    drawn = Image.open(io.BytesIO(figure._repr_png_()))
    assert drawn.format == "PNG"
    assert drawn.size[0] > drawn.size[1]
    assert len(drawn.convert("RGB").getcolors(1 << 16)) > 10


def test_scripts_are_set_in_fonts_that_have_them(fonts):
    assert style.font_for("手写数字三")[0] == "Noto Sans CJK SC"
    assert style.font_for("한국어")[0] == "Noto Sans CJK KR"
    assert style.font_for("рукописная цифра")[0] == "Inter"
    assert style.font_for("größer")[0] != "Inter"  # has no ö here: no word is set in two fonts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = ["手写数字三", "사진", "рукописная цифра семь", "τρία", "größer"]
        viz.similarity(np.eye(5), rows, images=[PICTURE] * 5, title="日本語").draw_without_rendering()


def test_gallery_puts_titles_rows_and_marks():
    figure = viz.gallery([PICTURE] * 5, list("abcde"), columns=3, rows=["one", "two"], right=[True] * 4 + [False])
    assert {"a", "e", "one", "two"} <= set(texts(figure))
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 5
    edges = [axes.spines["left"].get_edgecolor()[:3] for axes in shown]
    assert edges[0] == edges[3] != edges[4]
    with pytest.raises(ValueError, match="titles: expected 5, one a picture, came 2"):
        viz.gallery([PICTURE] * 5, ["a", "b"])
    with pytest.raises(ValueError, match="rows: expected 2, one a line of 3 pictures, came 1"):
        viz.gallery([PICTURE] * 5, columns=3, rows=["one"])
    with pytest.raises(ValueError, match="came none"):
        viz.gallery([])


def test_overlay_covers_the_hot_and_leaves_the_cold():
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 0.5
    figure = viz.overlay(PICTURE, [heat, heat / 2], titles=["word", "other"], notes=["here", "there"])
    assert {"word", "other", "here", "there", "picture"} <= set(texts(figure))
    maps = [axes.images[1].get_array() for axes in figure.axes if len(axes.images) == 2]
    assert len(maps) == 2
    rows, columns = maps[0].shape[:2]
    at = int(1.5 * rows / 4), int(2.5 * columns / 4)
    assert maps[0][at][3] > 0.7
    assert maps[0][-1, 0, 3] == 0  # the picture itself
    assert maps[1][at][3] < maps[0][at][3]  # one scale for both
    hottest = np.unravel_index(maps[0][..., 3].argmax(), maps[0].shape[:2])
    assert np.allclose(hottest, at, atol=rows / 16)


@pytest.mark.parametrize("heat", [np.full((4, 4), -1.0), np.full((4, 4), np.nan), np.ones(4)])
def test_overlay_refuses_what_is_no_heat(heat):
    with pytest.raises(ValueError, match=r"expected \[rows, columns\] of finite numbers from 0 up"):
        viz.overlay(PICTURE, [heat])


def test_pixels_of_a_processor_are_no_picture():
    with pytest.raises(ValueError, match="show the picture that went in"):
        viz.gallery([np.linspace(-1, 1, 192, dtype=np.float32).reshape(8, 8, 3)])
    with pytest.raises(ValueError, match=r"expected \[height, width\] or"):
        viz.gallery([np.zeros((3, 8, 8, 1), np.uint8)])


def test_words_are_shaded_and_those_to_come_left_out():
    from matplotlib.patches import Rectangle

    weights = np.array([[0.2, 0.8, np.nan], [0.1, 0.3, 0.6]])
    figure = viz.attention_over_words(["First", "then", "three"], weights, rows=["three", "eight"], numbers=True)
    assert {"First", "20", "80", "60", "eight"} <= set(texts(figure))
    boxes = [box for box in figure.axes[0].findobj(Rectangle) if box.get_height() < 1 and box.get_width() < 1]
    lightness = [sum(box.get_facecolor()[:3]) for box in boxes]
    assert len(boxes) == 5
    assert int(np.argmin(lightness)) == 1
    with pytest.raises(ValueError, match=r"expected \[rows, 2\] for these words"):
        viz.attention_over_words(["a", "b"], np.ones(3))
    with pytest.raises(ValueError, match="from 0 up"):
        viz.attention_over_words(["a", "b"], np.array([0.5, -0.5]))


def test_similarity_frames_the_best_of_each_column():
    matrix = np.array([[-0.001, 0.9], [0.7, 0.2]])
    figure = viz.similarity(matrix, ["cat", "dog"], ["x", "y"], images=[PICTURE] * 2)
    assert {"0.90", "0.00", "cat", "y"} <= set(texts(figure))
    frames = [patch.get_xy() for patch in figure.axes[-1].patches if not patch.get_fill()]
    assert frames == [(0, 1), (1, 0)]
    with pytest.raises(ValueError, match="rows: expected 2 for a matrix"):
        viz.similarity(matrix, ["cat"], ["x", "y"])
    with pytest.raises(ValueError, match="columns: expected 2"):
        viz.similarity(matrix, ["cat", "dog"])


def test_signed_values_have_two_colours_and_zero_none():
    from matplotlib.patches import Rectangle

    figure = viz.similarity(np.array([[-2.0, 0.0, 1.0]]), ["a"], ["x", "y", "z"], signed=True, highlight=False)
    boxes = [box for box in figure.axes[-1].patches if isinstance(box, Rectangle)]
    below, zero, above = (box.get_facecolor()[:3] for box in boxes)
    assert min(zero) > 0.95
    assert below[0] > below[2]  # red
    assert above[2] > above[0]  # blue
    assert min(below) < min(above)  # one scale for both


def test_a_band_goes_with_its_line():
    figure = viz.curves({"a": [1.0, 2.0], "b": [2.0, 1.0]}, spread={"b": [0.5, 0.25]})
    (band,) = figure.axes[0].collections
    np.testing.assert_allclose(sorted(set(band.get_paths()[0].vertices[:, 1])), [0.75, 1.25, 1.5, 2.5])
    with pytest.raises(ValueError, match="spread: expected names of lines, came \\['c'\\]"):
        viz.curves({"a": [1.0]}, spread={"c": [1.0]})


TREE = {"tower": {"layers_0": {"mlp": {"kernel": np.zeros((40, 30))}, "norm": np.zeros(300)}}, "head": np.zeros(500)}


def test_parts_are_as_high_as_they_have_numbers():
    from matplotlib.patches import Rectangle

    figure = viz.parts(TREE, depth=3, title="a model")
    assert {"tower", "layers_0", "mlp", "norm", "head", "1.5k", "1.2k", "300"} <= set(texts(figure))
    heights = [box.get_height() for box in figure.axes[0].findobj(Rectangle) if box.get_width() == 0.988]
    assert heights == [500, 1500, 1500, 1200, 300]
    assert "kernel" not in texts(figure)
    with pytest.raises(ValueError, match="came 0 and 4"):
        viz.parts({})


def test_parts_that_learn_are_coloured_by_their_share():
    from matplotlib.patches import Rectangle

    learning = {"tower": {"layers_0": {"norm": np.zeros(300)}}}
    figure = viz.parts(TREE, learning=learning, depth=3)
    assert "300 learn, 1.7k are frozen" in texts(figure)
    first, *_ = [box for box in figure.axes[0].findobj(Rectangle) if 0 < box.get_width() < 0.98]
    assert first.get_width() == pytest.approx(0.988 * 300 / 1500)
    with pytest.raises(ValueError, match="expected parameters of the model, came"):
        viz.parts(TREE, learning={"other": np.zeros(3)})


def test_the_names_of_lines_do_not_lie_on_each_other():
    values = np.linspace(3, 1, 50)
    figure = viz.losses({name: values + 0.001 * i for i, name in enumerate(["all", "LoRA", "head", "none"])})
    figure.draw_without_rendering()
    named = [text for text in figure.axes[0].texts if text.get_text()]
    assert len(named) == 4
    boxes = sorted((text.get_window_extent() for text in named), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    with pytest.raises(ValueError, match="x: expected 50 or more"):
        viz.losses({"all": values}, x=[1, 2])
    with pytest.raises(ValueError, match="at least one value"):
        viz.losses({"all": []})
    with pytest.raises(ValueError, match="dotted: expected names of lines"):
        viz.curves({"all": values}, dotted=["other"])


def test_running_mean_begins_at_the_first_value():
    np.testing.assert_allclose(running_mean(np.array([4.0, 4.0, 4.0]), 0.9), 4.0)
    np.testing.assert_allclose(running_mean(np.array([1.0, 0.0]), 0.5), [1.0, 1 / 3])
