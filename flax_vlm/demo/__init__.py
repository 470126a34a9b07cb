"""The demo: a PyTorch AltCLIP is converted, reads handwritten digits in six languages, and shows what it read.

The example folder, examples/altclip-digits, holds all it needs: the checkpoint, pictures that the model never saw, the
words and sentences of each language, and fonts. Nothing is downloaded; torch and transformers are not used.

A pictures   L languages
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from rich.text import Text

import flax_vlm
from flax_vlm.demo.contact_sheet import draw
from flax_vlm.demo.reading import EXAMPLE_WORD, Language, Reading, read_held_out, read_languages, read_pictures

__all__ = ["EXAMPLE_WORD", "Language", "Reading", "read_held_out", "read_languages", "read_pictures", "run"]

SHEET = "digits.png"


def run(example: Path, output: Path) -> None:
    """Converts the example's checkpoint, reads its held-out digits, prints what it reads, and draws it.

    The picture is `output`/digits.png; the folder is made where it is missing.

    Raises:
      ValueError: when `example` is not the folder of the example.
    """
    if not (example / "heldout.npz").is_file():
        raise ValueError(
            f"{example}: expected the folder altclip-digits of this project's examples; there is no heldout.npz"
        )
    from flax_vlm import convert

    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / "altclip-digits"
        with _step(console, f"Converting {example / 'checkpoint'} from PyTorch to JAX"):
            convert.to_flax(example / "checkpoint", native)
        with _step(console, "Loading it with flax_vlm.from_pretrained"):
            vlm = flax_vlm.from_pretrained(native)
    with _step(console, "Compiling the model, and reading 360 digits in six languages"):
        reading = read_held_out(vlm, example)
    console.print(accuracy_table(reading), pictures_table(reading, console.color_system is not None))
    with _step(console, f"Drawing {output / SHEET}"):
        output.mkdir(parents=True, exist_ok=True)
        draw(reading, example / "fonts").save(output / SHEET, optimize=True)


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Says what is being done, and how long it took."""
    console.print(f"{what} ...", highlight=False, soft_wrap=True, end=" ")
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
    """Some pictures, easy and hard, and what is read in each language; a ✗ stands beside what is wrong."""
    table = Table(title="\nThe likeliest word, and its probability", title_justify="left", show_lines=True)
    table.add_column("picture")
    table.add_column("is")
    for language in reading.languages:
        table.add_column(language.native, justify="center")
    for index in [*reading.one_of_each()[::3], *reading.hardest(4)]:
        cells = [thumbnail(reading.images[index], coloured), str(reading.labels[index])]
        for i, language in enumerate(reading.languages):
            digit = reading.digits[index, i]
            answer = f"{language.word(digit)}\n{reading.probabilities[index, i, digit]:.0%}"
            right = reading.right[index, i]
            cells.append(Text(answer, "green") if right else Text(f"{answer} ✗", "bold red"))
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
