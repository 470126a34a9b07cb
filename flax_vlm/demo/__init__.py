"""The demo: two PyTorch checkpoints are converted; an AltCLIP reads handwritten digits, an IDEFICS talks about them.

The folders examples/altclip-digits and examples/idefics-digits hold all it needs: the checkpoints, pictures that the
models never saw, the words and sentences of each language, and fonts. Nothing is downloaded; torch and transformers are
not used. What the GLM-4V of examples/glm4v-digits is asked stands beside it (`scenes`), for its notebook and its tests.

A pictures   L languages
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flax_vlm.demo.contact_sheet import draw
from flax_vlm.demo.conversation import converse, talk_table
from flax_vlm.demo.reading import EXAMPLE_WORD, Language, Reading, read_held_out, read_languages, read_pictures
from flax_vlm.demo.scenes import (
    Scene,
    SceneQuestion,
    SceneSpeech,
    SceneTalk,
    SceneTask,
    ask_about_held_out,
    ask_about_scenes,
    make_scene_questions,
    read_scene_speeches,
    scenes_table,
)
from flax_vlm.demo.talking import Question, Speech, Talk, ask, ask_held_out, make_questions, read_speeches
from flax_vlm.demo.terminal import converted, step, thumbnail

__all__ = [
    "EXAMPLE_WORD",
    "Language",
    "Question",
    "Reading",
    "Scene",
    "SceneQuestion",
    "SceneSpeech",
    "SceneTalk",
    "SceneTask",
    "Speech",
    "Talk",
    "accuracy_table",
    "ask",
    "ask_about_held_out",
    "ask_about_scenes",
    "ask_held_out",
    "make_questions",
    "make_scene_questions",
    "pictures_table",
    "read_held_out",
    "read_languages",
    "read_pictures",
    "read_scene_speeches",
    "read_speeches",
    "run",
    "scenes_table",
    "talk_table",
]

SHEET = "digits.png"


def run(examples: Path, output: Path) -> None:
    """Converts both checkpoints, prints what AltCLIP reads, draws it, and prints what IDEFICS answers.

    The picture is `output`/digits.png; the folder is made where it is missing.

    Args:
      examples: the folder with altclip-digits and idefics-digits.

    Raises:
      ValueError: when it is another.
    """
    reading, talking = examples / "altclip-digits", examples / "idefics-digits"
    for example in (reading, talking):
        if not (example / "heldout.npz").is_file():
            raise ValueError(f"{examples}: expected the folder of this project's examples; {example.name} is not there")
    console = Console()
    sheet = read_aloud(console, reading)
    with step(console, f"Drawing {output / SHEET}"):
        output.mkdir(parents=True, exist_ok=True)
        draw(sheet, reading / "fonts").save(output / SHEET, optimize=True)
    converse(console, talking)


def read_aloud(console: Console, example: Path) -> Reading:
    """Converts the example's checkpoint, reads its held-out digits, and prints what it reads."""
    vlm = converted(console, example)
    with step(console, "Compiling the model, and reading 360 digits in six languages"):
        reading = read_held_out(vlm, example)
    console.print(accuracy_table(reading), pictures_table(reading, console.color_system is not None))
    return reading


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
