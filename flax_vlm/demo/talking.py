"""What a small IDEFICS is asked about rows of pictures of digits, in several languages, and what it answers.

Q questions   A pictures
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer, UInt8

from flax_vlm.inference import Answers, in_order
from flax_vlm.pretrained import VLM

PLACE = "<image>"
Task = Literal["naming", "larger"]


@dataclass(frozen=True)
class Speech:
    """How one language asks and answers. `<image>` in a prompt is the place of a picture.

    Attributes:
      words: the names of the ten digits.
      naming: prompts for one picture, for two, for three, each worded in several ways.
      larger: prompts about two pictures.
      separators: what stands between digits that are listed, and before the last of them.
      answer: `{}` is the place of the list.
    """

    code: str
    language: str
    words: Sequence[str]
    naming: Sequence[Sequence[str]]
    larger: Sequence[str]
    separators: tuple[str, str]
    answer: str

    def say(self, digits: Sequence[int]) -> str:
        """The digits as an answer names them."""
        return self.answer.format(listed([self.words[digit] for digit in digits], self.separators))

    def heard(self, answer: str) -> list[str]:
        """The words of an answer."""
        start, end = self.answer.split("{}")
        return re.split("|".join(map(re.escape, self.separators)), answer.removeprefix(start).removesuffix(end))


@dataclass(frozen=True)
class Question:
    """A prompt, which pictures stand in it (by number), and the digits of the right answer."""

    speech: Speech
    task: Task
    prompt: str
    pictures: tuple[int, ...]
    digits: tuple[int, ...]

    @property
    def answer(self) -> str:
        return self.speech.say(self.digits)

    def items(self, pictures: Sequence[Any]) -> list[Any]:
        """The prompt as the processor takes it; `pictures` are its own."""
        first, *texts = self.prompt.split(PLACE)
        items = [first]
        for picture, text in zip(pictures, texts, strict=True):
            items += [picture, text]
        return [item for item in items if not isinstance(item, str) or item]


@dataclass(frozen=True)
class Talk:
    """Questions, and an answer to each."""

    questions: Sequence[Question]
    answers: Sequence[str]

    @property
    def speeches(self) -> list[Speech]:
        """The languages of the questions."""
        return list({question.speech.code: question.speech for question in self.questions}.values())

    def scores(self, speech: Speech) -> dict[str, tuple[int, int]]:
        """What is right in one language, and how many there are of it.

        A picture is right when the answer has its name at its place in the list; a list and the larger of two digits
        are when the whole answer is, to the last character.
        """
        names: list[bool] = []
        answers: dict[Task, list[bool]] = {"naming": [], "larger": []}
        for question, answer in zip(self.questions, self.answers, strict=True):
            if question.speech != speech:
                continue
            answers[question.task].append(answer == question.answer)
            if question.task == "naming":
                expected = [speech.words[digit] for digit in question.digits]
                names += [name == word for name, word in zip_longest(expected, speech.heard(answer)) if name]
        found = {"pictures named": names, "whole lists": answers["naming"], "larger digits": answers["larger"]}
        return {what: (sum(right), len(right)) for what, right in found.items()}


def listed(words: Sequence[str], separators: tuple[str, str]) -> str:
    """One, two and three: what stands between words, and before the last of them."""
    *before, last = words
    between, before_last = separators
    return before_last.join([between.join(before), last] if before else [last])


def read_speeches(example: Path) -> list[Speech]:
    """The languages of an example's prompts.json."""
    return [Speech(**entry) for entry in json.loads((example / "prompts.json").read_text("utf-8"))]


def make_questions(speeches: Sequence[Speech], labels: Integer[np.ndarray, " A"], seed: int = 0) -> list[Question]:
    """Shows every picture once in each language, in prompts of one, two and three; and pairs of different digits.

    The wordings take turns.
    """
    rng, questions = np.random.default_rng(seed), []
    for speech in speeches:
        order, at = rng.permutation(len(labels)).tolist(), 0
        for number in range(len(labels)):
            count = 1 + number % 3
            pictures = tuple(order[at : at + count])
            if len(pictures) < count:
                break
            prompts, at = speech.naming[count - 1], at + count
            prompt = prompts[number // 3 % len(prompts)]
            questions.append(Question(speech, "naming", prompt, pictures, tuple(labels[list(pictures)].tolist())))
        for number, pair in enumerate(rng.permutation(len(labels))[: len(labels) // 2 * 2].reshape(-1, 2)):
            smaller, larger = sorted(labels[pair].tolist())
            if smaller < larger:
                prompt = speech.larger[number % len(speech.larger)]
                questions.append(Question(speech, "larger", prompt, tuple(pair.tolist()), (larger,)))
    return questions


def ask(vlm: VLM, questions: Sequence[Question], images: UInt8[np.ndarray, "A 8 8"]) -> Talk:
    """Puts all questions at once; the likeliest token is taken at every step."""
    prompts = [question.items([images[i] for i in question.pictures]) for question in questions]
    longest = max(len(vlm.processor.tokenizer.backend.encode(question.answer)) for question in questions)
    answers = in_order(Answers(vlm, max_new_tokens=longest + 1), prompts, batch_size=len(prompts))
    return Talk(questions, [answer.text for answer in answers])


def ask_held_out(vlm: VLM, example: Path) -> Talk:
    """Asks about the pictures of the example's heldout.npz, none of which the model was trained on."""
    with np.load(example / "heldout.npz") as held_out:
        return ask(vlm, make_questions(read_speeches(example), held_out["labels"]), held_out["images"])
