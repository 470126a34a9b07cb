"""How good a model is on a data set: exact match, VQA accuracy, zero-shot accuracy, retrieval.

    questions  {"image": ..., "question": "How many?", "answers": ["2", "two"]}, also "images" and "answer"; or a
               conversation as for training, whose last message is the answer
    labels     {"image": ..., "label": "cat"}; or the number of a label, where their names are given
    captions   {"image": ..., "texts": ["A cat.", "An animal."]}, also "text", "captions" and "caption"

The measures are functions of plain numbers and texts. What runs a model takes a `VLM` and a sequence of records, which
go through `flax_vlm.inference`; a record of which nothing can be made is an error, as no figure would be of all.

N pictures   T texts   Q queries   E width of the shared space
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from flax_vlm.inference import Answers, Mapped, PictureVectors, TextVectors, embed, in_order, unit
from flax_vlm.inference.engine import Done
from flax_vlm.training.data import examples
from flax_vlm.training.data.prompts import read_prompt
from flax_vlm.training.data.records import Record

Score = Callable[[str, Sequence[str]], float]

RECALL_AT = (1, 5, 10)
_CAPTIONS = ("texts", "text", "captions", "caption")
_ARTICLES = {"a", "an", "the"}
_MARKS = ".,;:!?…'\"`()[]{}«»‹›„“”‚‘’¿¡。，、；：！？「」『』（）"


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where an answer is one of `references`, but for case, articles and the marks around its words."""
    return float(_plain(answer) in map(_plain, references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(people who gave this answer / 3, 1), averaged over the sets of all people but one (arXiv:1505.00468).

    As in the official code, which says the like of 0, 0.3, 0.6, 0.9 and 1 for ten people. Answers are compared in its
    normal form, unanimous ones too (as TextVQA does; the official code leaves those as they are).

    Raises:
      ValueError: for fewer than four references, with which no answer could count fully.
    """
    if len(references) < 4:
        raise ValueError(
            f"VQA accuracy: expected the answers of 4 people or more, usually of 10, came {len(references)}. "
            "Is exact match what is meant?"
        )
    given = vqa_form(answer)
    same = np.array([vqa_form(reference) == given for reference in references])
    return float(np.minimum((same.sum() - same) / 3, 1).mean())


def zero_shot_accuracy(
    images: Float[np.ndarray, "N E"], classes: Float[np.ndarray, "C E"], labels: Integer[np.ndarray, " N"]
) -> dict[str, float]:
    """How often the nearest class, and for more than five classes one of the nearest five, is the right one."""
    scores = images @ classes.T
    right = np.take_along_axis(scores, labels[:, None], axis=-1)
    ranks = (~(scores < right)).sum(-1) - 1  # neither a tie nor NaN is a success
    return {f"accuracy@{k}": float((ranks < k).mean()) for k in (1, 5) if k < len(classes)}


def recall(
    images: Float[np.ndarray, "N E"],
    texts: Float[np.ndarray, "T E"],
    image_of_text: Integer[np.ndarray, " T"],
    at: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """How often what belongs to a query is among the k nearest to it, each way; a picture may have several texts.

    Of a picture, any one of its texts counts.
    """
    own = image_of_text == np.arange(len(images))[:, None]  # [N, T]
    ranks = {"text_to_image": _ranks(texts, images, own.T), "image_to_text": _ranks(images, texts, own)}
    return {f"{way}_recall@{k}": float((rank < k).mean()) for way, rank in ranks.items() for k in at}


def question_answering(
    vlm: Any,
    records: Sequence[Record],
    score: Score,
    *,
    template: str | None = None,
    batch_size: int = 8,
    done: Done = lambda _: None,
    **options: Any,
) -> dict[str, float]:
    """The mean of `score`, `exact_match` or `vqa_accuracy`, over what a model answers to questions about pictures.

    Args:
      template: a text to put each question in, with {} as its place; the pictures come first. By default the question
        is what the user says in the model's layout of a chat.
      options: of `vlm.generate`.
    """
    _check_any(records)
    asked = Mapped(lambda record: prompt_and_answers(record, template)[0], records)
    answers = in_order(Answers(vlm, **options), asked, batch_size, done)
    references = (prompt_and_answers(record, template)[1] for record in records)
    scores = [score(answer.text, right) for answer, right in zip(answers, references, strict=True)]
    return {"questions": len(scores), score.__name__: float(np.mean(scores))}


def zero_shot(
    vlm: Any,
    records: Sequence[Record],
    *,
    labels: Sequence[str] = (),
    templates: Sequence[str] = ("{}",),
    batch_size: int = 32,
    done: Done = lambda _: None,
) -> dict[str, float]:
    """How often pictures are nearest to the sentences of their label (CLIP, arXiv:2103.00020, 3.1).

    Args:
      labels: all of them, in the order of their numbers; by default those of the records.
      templates: sentences to put each label in, with {} as its place; a label is the mean of its sentences.

    Raises:
      ValueError: for a label that is none of `labels`, and for a single one.
    """
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"template {wrong[0]!r}: expected {{}} where the label goes, as in 'a photo of a {{}}'")
    _check_any(records)
    shown = [_field(record, "label") for record in records]
    if not labels and not all(isinstance(label, str) for label in shown):
        raise ValueError("label: expected texts, came numbers. Say in --labels what they mean, in their order")
    names = list(labels or dict.fromkeys(shown))
    if len(names) < 2:
        raise ValueError(f"expected two labels or more to choose from, came {names}")
    numbers = {name: number for number, name in enumerate(names)} | {number: number for number in range(len(names))}
    if unknown := [label for label in shown if label not in numbers]:
        raise ValueError(f"label: expected one of {len(names)} labels or its number, came {unknown[0]!r}")
    sentences = [template.replace("{}", name) for name in names for template in templates]
    right = np.array([numbers[label] for label in shown])
    images = _embed_images(vlm, records, batch_size, done)
    vectors = embed(TextVectors(vlm), sentences, batch_size).reshape(len(names), len(templates), -1).mean(1)
    return {"pictures": len(shown), "labels": len(names)} | zero_shot_accuracy(images, unit(vectors), right)


def retrieval(
    vlm: Any,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    at: Sequence[int] = RECALL_AT,
    done: Done = lambda _: None,
) -> dict[str, float]:
    """`recall` of pictures by their captions, and of captions by their pictures."""
    _check_any(records)
    captions = [_field(record, *_CAPTIONS) for record in records]
    several = [[each] if isinstance(each, str) else list(each) for each in captions]
    if not all(several):
        raise ValueError("captions: expected at least one of every picture, came an empty list")
    images = _embed_images(vlm, records, batch_size, done)
    texts = embed(TextVectors(vlm), [text for each in several for text in each], batch_size)
    image_of_text = np.repeat(np.arange(len(several)), [len(each) for each in several])
    return {"pictures": len(images), "captions": len(texts)} | recall(images, texts, image_of_text, at)


def vqa_form(answer: str) -> str:
    """The form in which VQA's official code compares answers: no punctuation or articles, digits for number words."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    digits_apart = re.search(r"\d,\d", text) is not None
    form = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        alone = f"{mark} " in text or f" {mark}" in text
        form = form.replace(mark, "" if alone or digits_apart else " ")
    form = re.sub(r"\.(?!\d)", "", form)
    words = [_NUMBERS.get(word, word) for word in form.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
# Each is also written with one of its apostrophes left out.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
        "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd "
        "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
        "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't "
        "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll "
        "who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
        "you'll you're you've"
    ).split()
    for at, letter in enumerate(word)
    if letter == "'"
}


def _plain(text: str) -> str:
    marked = unicodedata.normalize("NFKC", text).casefold().split()
    words = [word for each in marked if (word := each.strip(_MARKS))]
    return " ".join([word for word in words if word not in _ARTICLES] or words)  # "A" may be all of an answer


def _field(record: Record, *names: str) -> Any:
    """What a record has under the first of these names that it has."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(f"expected {' or '.join(map(repr, names))} in a record, came {sorted(record)}")


def _check_any(records: Sequence[Record]) -> None:
    if not len(records):
        raise ValueError("expected at least one record, came none")


def _embed_images(vlm: Any, records: Sequence[Record], batch_size: int, done: Done) -> Float[np.ndarray, "N E"]:
    pictures = Mapped(lambda record: _field(record, "image"), records)
    return embed(PictureVectors(vlm), pictures, batch_size, done)


def prompt_and_answers(record: Record, template: str | None) -> tuple[list[Any], list[str]]:
    """A prompt for the processor, and the right answers to it."""
    prompt = read_prompt(record, template)
    if "messages" in record:
        *_, last = examples.read_messages(record, sys.maxsize)
        if last["role"] != "assistant":
            raise ValueError(f"messages: expected one of the assistant at the end, came one of {last['role']!r}")
        return prompt, ["".join(part["text"] for part in last["content"])]
    _field(record, "question")
    references = _field(record, "answers", "answer")
    references = [references] if isinstance(references, str) else references
    return prompt, [each["answer"] if isinstance(each, Mapping) else each for each in references]


def _ranks(
    queries: Float[np.ndarray, "Q E"], items: Float[np.ndarray, "M E"], own: np.ndarray, rows: int = 1024
) -> Integer[np.ndarray, " Q"]:
    """How many items of others are not further from each query than the nearest of its own.

    Neither a tie nor NaN is a success.
    """
    ranks = []
    for start in range(0, len(queries), rows):
        mine = own[start : start + rows]
        scores = queries[start : start + rows] @ items.T
        best = np.where(mine, scores, -np.inf).max(-1, keepdims=True)
        ranks.append((~mine & ~(scores < best)).sum(-1))
    return np.concatenate(ranks)
