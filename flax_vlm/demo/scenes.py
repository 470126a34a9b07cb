"""Four digits in one picture, and what a small GLM-4V is asked about them: which is where, where is which, and all.

A pictures of digits   S scenes
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image
from rich.table import Table

from flax_vlm.demo.talking import listed
from flax_vlm.inference import Answers, in_order
from flax_vlm.pretrained import VLM

CELL = 16  # pixels of a digit in a scene, which has two by two of them
EMPTY = -1  # in place of a picture's number
SceneTask = Literal["which", "where", "every"]
TASKS: tuple[SceneTask, ...] = ("which", "where", "every")


@dataclass(frozen=True)
class SceneSpeech:
    """How one language asks and answers about scenes. Places are numbered in the order of reading.

    Attributes:
      words: the names of the ten digits.
      places: the names of the four cells.
      which, where: questions with a place for the name of a cell, or of a digit; each worded in several ways.
      every: questions for all digits, in the order of reading.
      nothing: what is in an empty cell.
      separators: what stands between digits that are listed, and before the last of them.
    """

    code: str
    language: str
    words: Sequence[str]
    places: Sequence[str]
    which: Sequence[str]
    where: Sequence[str]
    every: Sequence[str]
    nothing: str
    separators: tuple[str, str]


@dataclass(frozen=True)
class Scene:
    """Four cells in the order of reading: the numbers of their pictures or EMPTY, and the digits on these."""

    pictures: tuple[int, ...]
    digits: tuple[int, ...]

    def draw(self, pictures: UInt8[np.ndarray, "A 8 8"]) -> UInt8[np.ndarray, "32 32 3"]:
        """As the model sees it."""
        large = [None if i == EMPTY else enlarged(pictures[i]) for i in self.pictures]
        return np.asarray(arranged(large).convert("RGB"))


@dataclass(frozen=True)
class SceneQuestion:
    """A question and its right answer; `cell` is the one that a question of one cell is about."""

    speech: SceneSpeech
    task: SceneTask
    scene: int
    cell: int
    wording: int
    digits: tuple[int, ...]

    @cached_property
    def text(self) -> str:
        wordings: Sequence[str] = getattr(self.speech, self.task)
        about = {
            "which": self.speech.places[self.cell],
            "where": self.speech.words[self.digits[self.cell]],
            "every": "",
        }
        return wordings[self.wording % len(wordings)].format(about[self.task])

    @property
    def answer(self) -> str:
        speech = self.speech
        if self.task == "where":
            return speech.places[self.cell]
        shown = self.digits if self.task == "every" else self.digits[self.cell : self.cell + 1]
        words = [speech.words[digit] for digit in shown if digit != EMPTY]
        return listed(words, speech.separators) if words else speech.nothing


@dataclass(frozen=True)
class SceneTalk:
    """Questions about scenes, and an answer to each."""

    questions: Sequence[SceneQuestion]
    answers: Sequence[str]

    def scores(self) -> dict[str, dict[SceneTask, tuple[int, int]]]:
        """For each language and kind of question what is right, to the last character, and how many there are."""
        found: dict[str, dict[SceneTask, tuple[int, int]]] = {}
        for question, answer in zip(self.questions, self.answers, strict=True):
            of_language = found.setdefault(question.speech.language, dict.fromkeys(TASKS, (0, 0)))
            right, total = of_language[question.task]
            of_language[question.task] = (right + (answer == question.answer), total + 1)
        return found


def enlarged(picture: UInt8[np.ndarray, "8 8"]) -> Image.Image:
    """A digit at the size that it has in a scene."""
    return Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BICUBIC)


def arranged(cells: Sequence[Image.Image | None]) -> Image.Image:
    """Four digits in one picture; None leaves a cell black."""
    whole = Image.new("L", (2 * CELL, 2 * CELL))
    for number, cell in enumerate(cells):
        if cell is not None:
            whole.paste(cell, (number % 2 * CELL, number // 2 * CELL))
    return whole


def read_scene_speeches(example: Path) -> list[SceneSpeech]:
    """The languages of an example's prompts.json."""
    return [SceneSpeech(**entry) for entry in json.loads((example / "prompts.json").read_text("utf-8"))]


def draw_scene(rng: np.random.Generator, labels: Integer[np.ndarray, " A"], empty: float = 0.2) -> Scene:
    """Four different digits, any picture of each; a cell is empty with this probability."""
    digits = rng.permutation(10)[:4]
    digits = np.where(rng.random(4) < empty, EMPTY, digits).tolist()
    pictures = [EMPTY if digit == EMPTY else int(rng.choice(np.flatnonzero(labels == digit))) for digit in digits]
    return Scene(tuple(pictures), tuple(digits))


def question_about(
    rng: np.random.Generator, speech: SceneSpeech, task: SceneTask, scene: Scene, number: int, cell: int
) -> SceneQuestion:
    """A question of this kind in any wording; for the place of a digit it takes a cell that is not empty."""
    if task == "where" and scene.digits[cell] == EMPTY:
        task = "which"
    return SceneQuestion(speech, task, number, cell, int(rng.integers(2)), scene.digits)


def make_scene_questions(
    speeches: Sequence[SceneSpeech], labels: Integer[np.ndarray, " A"], number: int = 200, seed: int = 0
) -> tuple[list[Scene], list[SceneQuestion]]:
    """So many scenes, and three questions about each in every language: of a place, of a digit, and for all."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, labels) for _ in range(number)]
    questions = []
    for speech in speeches:
        for i, scene in enumerate(scenes):
            filled = [cell for cell in range(4) if scene.digits[cell] != EMPTY]
            for task in TASKS:
                if task != "where" or filled:
                    cell = int(rng.choice(filled)) if task == "where" else i % 4
                    questions.append(question_about(rng, speech, task, scene, i, cell))
    return scenes, questions


def ask_about_scenes(
    vlm: VLM, scenes: Sequence[Scene], questions: Sequence[SceneQuestion], pictures: UInt8[np.ndarray, "A 8 8"]
) -> SceneTalk:
    """Puts all questions, each alone; the likeliest token is taken at every step."""
    drawn = [scene.draw(pictures) for scene in scenes]
    prompts = [[drawn[question.scene], question.text] for question in questions]
    ordinary_ids = vlm.processor.tokenizer.ordinary_ids
    longest = max(len(ordinary_ids("\n" + question.answer)) for question in questions)
    answers = in_order(Answers(vlm, max_new_tokens=longest + 1), prompts, batch_size=200)
    return SceneTalk(questions, [answer.text.strip() for answer in answers])


def ask_about_held_out(vlm: VLM, example: Path) -> SceneTalk:
    """Asks about scenes of the example's heldout.npz, none of whose pictures the model was trained on."""
    with np.load(example / "heldout.npz") as held_out:
        scenes, questions = make_scene_questions(read_scene_speeches(example), held_out["labels"])
        return ask_about_scenes(vlm, scenes, questions, held_out["images"])


def scenes_table(talk: SceneTalk) -> Table:
    """One row a language: how much of what it answers is right."""
    table = Table("language", title="\nRight answers about scenes of held-out digits", title_justify="left")
    for name in ("which is where", "where is which", "all"):
        table.add_column(name, justify="right")
    for language, scores in talk.scores().items():
        table.add_row(language, *(f"{right / total:.1%}" for right, total in scores.values()))
    return table
