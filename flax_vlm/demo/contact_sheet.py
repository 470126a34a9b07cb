"""The contact sheet: one picture of what the model read, drawn with Pillow."""

from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from flax_vlm.demo.reading import EXAMPLE_WORD, Language, Reading

SIZE = (1920, 1080)
_OVERSAMPLING = 2  # Pillow does not smooth round corners
_PAPER, _CARD, _BORDER, _TRACK, _INK, _MUTED = "#f6f3ec", "#ffffff", "#e9e4d9", "#efebe2", "#1f2433", "#7b8090"
_RIGHT, _WRONG, _WRONG_CARD, _WRONG_BORDER = "#1f8a70", "#cf3b3b", "#fff6f4", "#efc4bd"
_NIGHT, _CREAM = np.array([23, 27, 46]), np.array([255, 247, 229])  # of the pictures' black and white
_MARGIN, _GAP, _COLUMNS = 60, 20, 5
_CARD_SIZE = ((SIZE[0] - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS, 184)


def draw(reading: Reading, fonts: Path) -> Image.Image:
    """The languages with their accuracy, a picture of every digit, and the five hardest."""
    canvas = Canvas(fonts)
    canvas.text(_MARGIN, 94, "One small model reads handwriting in six languages", 42, bold=True)
    explanation = (
        f"An AltCLIP of a million parameters, converted from PyTorch to JAX, reads {len(reading.labels)} pictures that"
        " it has never seen. It compares each with ten sentences a language; bars show how sure it is of the likeliest."
    )
    canvas.text(_MARGIN, 130, explanation, 17, _MUTED)
    width = (SIZE[0] - 2 * _MARGIN + _GAP) / len(reading.languages) - _GAP
    for i, (language, accuracy) in enumerate(zip(reading.languages, reading.accuracy, strict=True)):
        _draw_language(canvas, _MARGIN + i * (width + _GAP), 160, width, language, accuracy)

    canvas.text(_MARGIN, 338, "One of each", 20, bold=True)
    for i, index in enumerate(reading.one_of_each()):
        _draw_card(canvas, i % _COLUMNS, 356 + i // _COLUMNS * (_CARD_SIZE[1] + 16), reading, index)
    canvas.text(_MARGIN, 806, "The five it finds hardest", 20, bold=True)
    for i, index in enumerate(reading.hardest(_COLUMNS)):
        _draw_card(canvas, i, 824, reading, index)
    source = "Pictures: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, CC BY 4.0"
    canvas.text(SIZE[0] - _MARGIN, 1044, source, 13, _MUTED, anchor="rs")
    return canvas.finished()


def _draw_language(canvas: "Canvas", x: float, y: float, width: float, language: Language, accuracy: float) -> None:
    """Names, accuracy as a number and a bar, and the sentence."""
    canvas.text(x, y + 30, language.native, 24, bold=True, code=language.code)
    if language.native != language.language:
        canvas.text(x, y + 52, language.language, 15, _MUTED)
    canvas.text(x + width, y + 36, f"{accuracy:.1%}", 32, _RIGHT, bold=True, anchor="rs")
    canvas.text(x + width, y + 54, "right", 14, _MUTED, anchor="rs")
    canvas.box(x, y + 66, width, 5, _TRACK, radius=2.5)
    canvas.box(x, y + 66, width * accuracy, 5, _RIGHT, radius=2.5)
    word = language.word(EXAMPLE_WORD)
    for i, line in enumerate(canvas.wrapped(language.prompt(EXAMPLE_WORD), width, 15, language.code)):
        before, word_if_here, after = line.partition(word)
        end = canvas.text(x, y + 97 + 21 * i, before, 15, _MUTED, code=language.code)
        end = canvas.text(end, y + 97 + 21 * i, word_if_here, 15, _RIGHT, code=language.code, bold=True)
        canvas.text(end, y + 97 + 21 * i, after, 15, _MUTED, code=language.code)


def _draw_card(canvas: "Canvas", column: int, y: float, reading: Reading, index: int) -> None:
    """A picture, and what is read in every language; red where one of them is wrong."""
    x = _MARGIN + column * (_CARD_SIZE[0] + _GAP)
    right, label = reading.right[index], str(reading.labels[index])
    card, border, color = (_CARD, _BORDER, _MUTED) if right.all() else (_WRONG_CARD, _WRONG_BORDER, _WRONG)
    canvas.box(x, y, *_CARD_SIZE, card, 12, border)
    canvas.picture(x + 14, y + 14, 16, reading.images[index])
    canvas.text(x + 14 + 64, y + 168, label if right.all() else f"labelled {label}", 15, color, anchor="ms")
    for i, language in enumerate(reading.languages):
        digit = reading.digits[index, i]
        probability = reading.probabilities[index, i, digit]
        line, color = y + 33 + 26 * i, _RIGHT if right[i] else _WRONG
        canvas.text(x + 163, line, language.word(digit), 16, _INK if right[i] else _WRONG, code=language.code)
        if not right[i]:
            canvas.text(x + 153, line, "✗", 11, _WRONG, anchor="ms")
        canvas.box(x + 240, line - 9, 48, 7, _TRACK, radius=3.5)
        canvas.box(x + 240, line - 9, max(48 * probability, 7), 7, color, radius=3.5)
        canvas.text(x + _CARD_SIZE[0] - 14, line, f"{probability:.0%}", 13, color, anchor="rs")


class Canvas:
    """Text, boxes and pictures on paper of SIZE; y of a text is its base line."""

    def __init__(self, fonts: Path) -> None:
        self.fonts = fonts
        self.image = Image.new("RGB", (SIZE[0] * _OVERSAMPLING, SIZE[1] * _OVERSAMPLING), _PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        color: str = _INK,
        *,
        bold: bool = False,
        code: str = "",
        anchor: str = "ls",
    ) -> float:
        """One line, in the script of the language `code`; gives the x at which what follows would start."""
        font = load_font(self.fonts, code, bold, size * _OVERSAMPLING)
        self.draw.text((x * _OVERSAMPLING, y * _OVERSAMPLING), text, color, font, anchor)
        return x + font.getlength(text) / _OVERSAMPLING

    def wrapped(self, text: str, width: float, size: int, code: str) -> list[str]:
        """`text` broken at spaces into lines that fit `width`."""
        font, lines = load_font(self.fonts, code, False, size * _OVERSAMPLING), [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width * _OVERSAMPLING:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, radius: float, outline: str | None = None
    ) -> None:
        corners = [edge * _OVERSAMPLING for edge in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, radius * _OVERSAMPLING, fill, outline, _OVERSAMPLING)

    def picture(self, x: float, y: float, pixel: int, image: UInt8[np.ndarray, "8 8"]) -> None:
        """The pixels as they are, each a square of `pixel`."""
        colors = _NIGHT + image[..., None] / 255 * (_CREAM - _NIGHT)
        side = len(image) * pixel * _OVERSAMPLING
        large = Image.fromarray(colors.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        self.image.paste(large, (round(x * _OVERSAMPLING), round(y * _OVERSAMPLING)))

    def finished(self) -> Image.Image:
        return self.image.resize(SIZE, Image.Resampling.LANCZOS)


@cache
def load_font(fonts: Path, code: str, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """The font of a language's script; Inter, where the folder has no other."""
    own = fonts / f"NotoSansCJK{code}-{'Bold' if bold else 'Regular'}.otf"
    return ImageFont.truetype(own if own.is_file() else fonts / f"Inter-{'SemiBold' if bold else 'Regular'}.otf", size)
