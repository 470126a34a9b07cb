"""The second part of the demo: a PyTorch IDEFICS is converted, and answers prompts that mix pictures and text."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table

from flax_vlm.demo.talking import PLACE, Question, Talk, make_questions, read_speeches
from flax_vlm.demo.terminal import converted, thumbnail
from flax_vlm.pretrained import VLM

SHOWN = [("en", "naming"), ("zh", "naming"), ("el", "naming"), ("de", "larger")]
_NUMBERS = "①②③"


def converse(console: Console, example: Path) -> None:
    """Converts the example's checkpoint, asks it about held-out pictures, and shows the answers as they come."""
    vlm = converted(console, example)
    with np.load(example / "heldout.npz") as held_out:
        images, labels = held_out["images"], held_out["labels"]
    questions = make_questions(read_speeches(example), labels)
    for code, task in SHOWN:
        most = max(len(question.pictures) for question in questions if question.task == task)
        asked = (q for q in questions if (q.speech.code, q.task, len(q.pictures)) == (code, task, most))
        answer_aloud(console, vlm, next(asked), images)


def answer_aloud(console: Console, vlm: VLM, question: Question, images: UInt8[np.ndarray, "A 8 8"]) -> None:
    """Prints pictures and prompt, and the answer piece by piece; a ✗ with the right answer follows a wrong one."""
    pictures = [images[i] for i in question.pictures]
    grid = Table.grid(padding=(0, 2))
    grid.add_row(*_NUMBERS[: len(pictures)])
    grid.add_row(*(thumbnail(picture, console.color_system is not None) for picture in pictures))
    console.print("\n", grid, sep="")
    prompt = question.prompt
    for number in _NUMBERS[: len(pictures)]:
        prompt = prompt.replace(PLACE, number, 1)
    console.print(prompt, end="", highlight=False)
    pieces: Any = vlm.generate(**vlm.processor([question.items(pictures)]), stream=True)
    answer = ""
    for piece in pieces:
        console.print(piece, style="bold green", end="", highlight=False)
        answer += piece
    console.print("" if answer == question.answer else f"  [bold red]✗ {question.answer.strip()}")


def talk_table(talk: Talk) -> Table:
    """One row a language: how much of what it answers is right."""
    pictures = {picture for question in talk.questions for picture in question.pictures}
    title = f"\nRight answers about {len(pictures)} handwritten digits the model has never seen"
    table = Table("language", title=title, title_justify="left")
    for speech in talk.speeches:
        scores = talk.scores(speech)
        if not table.rows:
            for what in scores:
                table.add_column(what, justify="right")
        table.add_row(speech.language, *(f"{right / total:.1%}" for right, total in scores.values()))
    return table
