"""The demo: a PyTorch AltCLIP is converted, reads handwritten digits in six languages, and shows what it read.

The example folder, examples/altclip-digits, holds all it needs: the checkpoint, pictures that the model never saw, the
words and sentences of each language, and fonts. Nothing is downloaded; torch and transformers are not used.

A pictures   L languages
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text

import flax_vlm
from flax_vlm import convert
from flax_vlm.pretrained import VLM

EXAMPLE_WORD = 7  # whose word stands in the sentences that are shown


@dataclass(frozen=True)
class Language:
    """`words[d]` are the names of digit d, the usual one first; `{}` in a sentence stands for one of them."""

    code: str
    language: str
    native: str
    zero_shot: str
    words: Sequence[Sequence[str]]
    templates: Sequence[str]

    def word(self, digit: int) -> str:
        """The usual name of a digit."""
        return self.words[digit][0]

    def prompt(self, digit: int) -> str:
        """The sentence that pictures are compared with."""
        return self.zero_shot.format(self.word(digit))


@dataclass(frozen=True)
class Reading:
    """Pictures, what they show, and how probable the model finds each digit in each language."""

    languages: Sequence[Language]
    images: UInt8[np.ndarray, "A 8 8"]
    labels: Integer[np.ndarray, " A"]
    probabilities: Float[np.ndarray, "A L 10"]

    @property
    def digits(self) -> Integer[np.ndarray, "A L"]:
        """The likeliest digit."""
        return self.probabilities.argmax(-1)

    @property
    def right(self) -> Bool[np.ndarray, "A L"]:
        return self.digits == self.labels[:, None]

    @property
    def accuracy(self) -> Float[np.ndarray, " L"]:
        return self.right.mean(0)

    def one_of_each(self) -> list[int]:
        """For every digit the first picture that is read rightly in all languages."""
        return [int(np.flatnonzero((self.labels == digit) & self.right.all(1))[0]) for digit in range(10)]

    def hardest(self, count: int) -> list[int]:
        """The pictures whose true digit is least probable, over all languages."""
        of_the_truth = self.probabilities[np.arange(len(self.labels)), :, self.labels].mean(1)
        return [int(index) for index in np.argsort(of_the_truth, kind="stable")[:count]]


def read_languages(example: Path) -> list[Language]:
    """The languages of an example's captions.json."""
    return [Language(**entry) for entry in json.loads((example / "captions.json").read_text("utf-8"))]


def read_pictures(
    vlm: VLM, languages: Sequence[Language], images: UInt8[np.ndarray, "A 8 8"], labels: Integer[np.ndarray, " A"]
) -> Reading:
    """Compares every picture with ten sentences in every language, and turns each ten logits into probabilities."""
    inputs = vlm.processor(
        text=[language.prompt(digit) for language in languages for digit in range(10)],
        images=[Image.fromarray(image) for image in images],
    )
    logits = vlm(**inputs).logits_per_image.reshape(len(images), len(languages), 10)
    return Reading(languages, images, labels, np.asarray(jax.nn.softmax(logits)))


def read_held_out(vlm: VLM, example: Path) -> Reading:
    """Reads the pictures of the example's heldout.npz, none of which the model was trained on."""
    with np.load(example / "heldout.npz") as held_out:
        return read_pictures(vlm, read_languages(example), held_out["images"], held_out["labels"])


def run(example: Path, output: Path) -> None:
    """Converts the example's checkpoint, reads its held-out digits, prints the result and draws it to `output`, a PNG.

    Raises:
      ValueError: when `example` is not the folder of the example.
    """
    if not (example / "heldout.npz").is_file():
        raise ValueError(
            f"{example}: expected the folder altclip-digits of this project's examples; there is no heldout.npz"
        )
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / "altclip-digits"
        with _step(console, f"Converting the PyTorch checkpoint {example / 'checkpoint'} to a native one"):
            convert.to_flax(example / "checkpoint", native)
        with _step(console, "Loading it with flax_vlm.from_pretrained"):
            vlm = flax_vlm.from_pretrained(native)
    with _step(console, "Compiling the model, and reading 360 digits in six languages"):
        reading = read_held_out(vlm, example)
    console.print(accuracy_table(reading), pictures_table(reading, console.color_system is not None))
    with _step(console, f"Drawing {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(reading, example / "fonts").save(output, optimize=True)


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Says what is being done, and how long it took."""
    console.print(f"{what} ...", highlight=False, end=" ")
    start = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)


def accuracy_table(reading: Reading) -> Table:
    """One row a language: the sentence in its script, and how many pictures it gets right."""
    table = Table(title=f"\n{len(reading.labels)} handwritten digits the model has never seen", title_justify="left")
    table.add_column("language")
    table.add_column(f"sentence, here with the word for {EXAMPLE_WORD}")
    table.add_column("right", justify="right")
    for language, accuracy in zip(reading.languages, reading.accuracy, strict=True):
        table.add_row(language.language, language.prompt(EXAMPLE_WORD), f"{accuracy:.1%}")
    return table


def pictures_table(reading: Reading, coloured: bool) -> Table:
    """Some pictures, easy and hard, and what is read in each language; the wrong words are red."""
    table = Table(title="\nThe likeliest word, and its probability", title_justify="left", show_lines=True)
    table.add_column("picture")
    for language in reading.languages:
        table.add_column(language.native, justify="center")
    for index in [*reading.one_of_each()[::3], *reading.hardest(4)]:
        cells = [thumbnail(reading.images[index], coloured)]
        for i, language in enumerate(reading.languages):
            digit = reading.digits[index, i]
            answer = f"{language.word(digit)}\n{reading.probabilities[index, i, digit]:.0%}"
            cells.append(Text(answer, "green" if reading.right[index, i] else "bold red"))
        table.add_row(*cells)
    return table


def thumbnail(image: UInt8[np.ndarray, "8 8"], coloured: bool) -> Text:
    """A picture in four lines of eight characters, each of which is two pixels, one above the other."""
    text = Text()
    for above, below in zip(image[::2].tolist(), image[1::2].tolist(), strict=True):
        for top, bottom in zip(above, below, strict=True):
            if coloured:
                text.append("▀", f"rgb({top},{top},{top}) on rgb({bottom},{bottom},{bottom})")
            else:
                text.append(" ▄▀█"[2 * (top > 127) + (bottom > 127)])
        text.append("\n")
    text.rstrip()
    return text


SHEET_SIZE = (1920, 1080)
_OVERSAMPLING = 2  # Pillow does not smooth round corners
_PAPER, _CARD, _BORDER, _TRACK, _INK, _MUTED = "#f6f3ec", "#ffffff", "#e9e4d9", "#efebe2", "#1f2433", "#7b8090"
_RIGHT, _WRONG, _WRONG_CARD, _WRONG_BORDER = "#1f8a70", "#cf3b3b", "#fff6f4", "#efc4bd"
_NIGHT, _CREAM = np.array([23, 27, 46]), np.array([255, 247, 229])  # of the pictures' black and white
_MARGIN, _GAP, _COLUMNS = 60, 20, 5
_CARD_SIZE = ((SHEET_SIZE[0] - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS, 184)


def contact_sheet(reading: Reading, fonts: Path) -> Image.Image:
    """The languages with their accuracy, a picture of every digit, and the five hardest."""
    canvas = Canvas(fonts)
    canvas.text(_MARGIN, 94, "One small model reads handwriting in six languages", 42, bold=True)
    explanation = (
        f"An AltCLIP of a million parameters, converted from PyTorch to JAX, has never seen these {len(reading.labels)}"
        " pictures. It compares each with ten sentences a language; bars show how sure it is of the likeliest."
    )
    canvas.text(_MARGIN, 130, explanation, 17, _MUTED)
    width = (SHEET_SIZE[0] - 2 * _MARGIN + _GAP) / len(reading.languages) - _GAP
    for i, (language, accuracy) in enumerate(zip(reading.languages, reading.accuracy, strict=True)):
        _draw_language(canvas, _MARGIN + i * (width + _GAP), 160, width, language, accuracy)

    canvas.text(_MARGIN, 338, "One of each", 20, bold=True)
    for i, index in enumerate(reading.one_of_each()):
        _draw_card(canvas, i % _COLUMNS, 356 + i // _COLUMNS * (_CARD_SIZE[1] + 16), reading, index)
    canvas.text(_MARGIN, 806, "The five it finds hardest", 20, bold=True)
    for i, index in enumerate(reading.hardest(_COLUMNS)):
        _draw_card(canvas, i, 824, reading, index)
    source = "Pictures: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, CC BY 4.0"
    canvas.text(SHEET_SIZE[0] - _MARGIN, 1044, source, 13, _MUTED, anchor="rs")
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
    """A picture, and what it is in every language."""
    x = _MARGIN + column * (_CARD_SIZE[0] + _GAP)
    right = reading.right[index]
    canvas.box(x, y, *_CARD_SIZE, _CARD if right.all() else _WRONG_CARD, 12, _BORDER if right.all() else _WRONG_BORDER)
    canvas.picture(x + 14, y + 14, 16, reading.images[index])
    label = str(reading.labels[index]) if right.all() else f"labelled {reading.labels[index]}"
    canvas.text(x + 14 + 64, y + 168, label, 15, _MUTED if right.all() else _WRONG, anchor="ms")
    for i, language in enumerate(reading.languages):
        digit = reading.digits[index, i]
        probability = reading.probabilities[index, i, digit]
        line, color = y + 33 + 26 * i, _RIGHT if right[i] else _WRONG
        canvas.text(x + 160, line, language.word(digit), 16, _INK if right[i] else _WRONG, code=language.code)
        canvas.box(x + 236, line - 9, 52, 7, _TRACK, radius=3.5)
        canvas.box(x + 236, line - 9, max(52 * probability, 7), 7, color, radius=3.5)
        canvas.text(x + _CARD_SIZE[0] - 14, line, f"{probability:.0%}", 13, color, anchor="rs")


class Canvas:
    """Text, boxes and pictures on paper of SHEET_SIZE; y of a text is its base line."""

    def __init__(self, fonts: Path) -> None:
        self.fonts = fonts
        self.image = Image.new("RGB", (SHEET_SIZE[0] * _OVERSAMPLING, SHEET_SIZE[1] * _OVERSAMPLING), _PAPER)
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
        return self.image.resize(SHEET_SIZE, Image.Resampling.LANCZOS)


@cache
def load_font(fonts: Path, code: str, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """The font of a language's script; Inter, where the folder has no other."""
    own = fonts / f"NotoSansCJK{code}-{'Bold' if bold else 'Regular'}.otf"
    return ImageFont.truetype(own if own.is_file() else fonts / f"Inter-{'SemiBold' if bold else 'Regular'}.otf", size)
