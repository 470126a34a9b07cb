"""How good a model is on a data set: exact match, VQA accuracy, zero-shot accuracy, retrieval.

    questions  {"image": ..., "question": "How many?", "answers": ["2", "two"]}, also "images" and "answer"; or a
               conversation as for training, whose last message is the answer
    labels     {"image": ..., "label": "cat"}; or the number of a label, where their names are given
    captions   {"image": ..., "texts": ["A cat.", "An animal."]}, also "text", "captions" and "caption"

The measures are functions of plain numbers and texts. What runs a model takes a `VLM` and any iterable of records; all
batches have one size, so that nothing is compiled for the last one.

N pictures   T texts   Q queries   E width of the shared space
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from flax_vlm.training.data import examples
from flax_vlm.training.data.records import Record

Score = Callable[[str, Sequence[str]], float]
Progress = Callable[[Iterable[Any]], Iterable[Any]]  # tqdm, say

RECALL_AT = (1, 5, 10)
_CAPTIONS = ("texts", "text", "captions", "caption")
_NO_RECORDS = "expected at least one record, came none"
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
    records: Iterable[Record],
    score: Score,
    *,
    template: str | None = None,
    batch_size: int = 8,
    progress: Progress = iter,
    **options: Any,
) -> dict[str, float]:
    """The mean of `score`, `exact_match` or `vqa_accuracy`, over what a model answers to questions about pictures.

    Args:
      template: a text to put each question in, with {} as its place; the pictures come first. By default the question
        is what the user says in the model's layout of a chat.
      options: of `vlm.generate`.
    """
    scores: list[float] = []
    for batch, count in _batches(progress(records), batch_size):
        asked = [prompt_and_answers(record, template) for record in batch]
        chats = {} if template else {"add_generation_prompt": True}
        inputs = vlm.processor([prompt for prompt, _ in asked], **chats)
        sequences = vlm.generate(**inputs, **options).sequences[:, inputs["input_ids"].shape[1] :]
        answers = vlm.processor.batch_decode(sequences)
        scores += [score(answer, references) for answer, (_, references) in zip(answers[:count], asked, strict=False)]
    if not scores:
        raise ValueError(_NO_RECORDS)
    return {"questions": len(scores), score.__name__: float(np.mean(scores))}


def zero_shot(
    vlm: Any,
    records: Iterable[Record],
    *,
    labels: Sequence[str] = (),
    templates: Sequence[str] = ("{}",),
    batch_size: int = 32,
    progress: Progress = iter,
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
    shown: list[Any] = []
    images = _embed_images(vlm, _images(progress(records), shown, "label"), batch_size)
    if not labels and not all(isinstance(label, str) for label in shown):
        raise ValueError("label: expected texts, came numbers. Say in --labels what they mean, in their order")
    names = list(labels or dict.fromkeys(shown))
    if len(names) < 2:
        raise ValueError(f"expected two labels or more to choose from, came {names}")
    numbers = {name: number for number, name in enumerate(names)} | {number: number for number in range(len(names))}
    if unknown := [label for label in shown if label not in numbers]:
        raise ValueError(f"label: expected one of {len(names)} labels or its number, came {unknown[0]!r}")
    sentences = [template.replace("{}", name) for name in names for template in templates]
    vectors = _embed_texts(vlm, sentences, batch_size).reshape(len(names), len(templates), -1).mean(1)
    found = zero_shot_accuracy(images, _normalised(vectors), np.array([numbers[label] for label in shown]))
    return {"pictures": len(shown), "labels": len(names)} | found


def retrieval(
    vlm: Any,
    records: Iterable[Record],
    *,
    batch_size: int = 32,
    at: Sequence[int] = RECALL_AT,
    progress: Progress = iter,
) -> dict[str, float]:
    """`recall` of pictures by their captions, and of captions by their pictures."""
    captions: list[Any] = []
    images = _embed_images(
        vlm, _images(progress(records), captions, "texts", "text", "captions", "caption"), batch_size
    )
    several = [[each] if isinstance(each, str) else list(each) for each in captions]
    if not all(several):
        raise ValueError("captions: expected at least one of every picture, came an empty list")
    texts = _embed_texts(vlm, [text for each in several for text in each], batch_size)
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


def _images(records: Iterable[Record], others: list[Any], *names: str) -> Iterator[Any]:
    """The pictures, one by one; what else a record has under one of `names` is put aside in `others`."""
    for record in records:
        others.append(_field(record, *names))
        yield _field(record, "image")


def prompt_and_answers(record: Record, template: str | None) -> tuple[list[Any], list[str]]:
    """A prompt for the processor, and the right answers to it."""
    if "messages" in record:
        if template is not None:
            raise ValueError("template: expected none for conversations, which the model has a layout for")
        *before, last = examples.read_messages(record, sys.maxsize)
        if last["role"] != "assistant":
            raise ValueError(f"messages: expected one of the assistant at the end, came one of {last['role']!r}")
        return before, ["".join(part["text"] for part in last["content"])]
    references = _field(record, "answers", "answer")
    references = [references] if isinstance(references, str) else references
    answers = [each["answer"] if isinstance(each, Mapping) else each for each in references]
    question = _field(record, "question")
    if isinstance(question, str):
        images = record.get("images") or [_field(record, "image")]
        if template is not None:
            return [*images, template.replace("{}", question)], answers
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        return [{"role": "user", "content": content}], answers
    unanswered = {**record, "answers": None, "answer": ""}
    asked, _ = examples.read_question(unanswered, sys.maxsize, np.random.default_rng(0))
    if template is None:
        return [asked], answers
    if template != "{}":
        raise ValueError(f"template: expected '{{}}' for a question with pictures among its texts, came {template!r}")
    return [part.get("image", part.get("text")) for part in asked["content"]], answers


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


def _batches(records: Iterable[Any], size: int) -> Iterator[tuple[list[Any], int]]:
    """Batches of one size and how many of each count: the last one is filled up, so that nothing compiles for it."""
    left = iter(records)
    while batch := list(islice(left, size)):
        yield batch + [batch[-1]] * (size - len(batch)), len(batch)


def _embed_images(vlm: Any, images: Iterable[Any], size: int) -> Float[np.ndarray, "N E"]:
    return _embed(lambda batch: vlm.get_image_features(**vlm.processor(images=batch)), images, size)


def _embed_texts(vlm: Any, texts: Iterable[str], size: int) -> Float[np.ndarray, "T E"]:
    return _embed(lambda batch: vlm.get_text_features(**vlm.processor(text=batch, pad_to_multiple_of=16)), texts, size)


def _embed(embed: Callable[[list[Any]], Any], items: Iterable[Any], size: int) -> Float[np.ndarray, "N E"]:
    """Unit vectors, in float32 at least."""
    features = [np.asarray(embed(batch))[:count] for batch, count in _batches(items, size)]
    if not features:
        raise ValueError(_NO_RECORDS)
    return _normalised(np.concatenate(features).astype(np.promote_types(np.float32, features[0].dtype)))


def _normalised(vectors: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N E"]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
