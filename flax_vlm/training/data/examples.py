"""From a record to what a model reads, and what of it is to be learnt.

    pairs          {"image": ..., "text": "A dog."}; of "texts" one is drawn each time
    documents      {"images": [dog, None, cat], "texts": [None, "A dog.", None]}, in the order of reading
    conversations  {"messages": [{"role": "user", "content": ...}, ...]}, pictures in the content as {"type": "image",
                   "image": ...}, or without "image" and listed in the record's own "images"; those may do without a
                   place in the content, and then stand in front of what the user says first
    questions      {"image": ..., "question": "How many?", "answer": " Two."}; of "answers" one is drawn each time. The
                   question may be content as above, with pictures among its texts

A picture is the bytes of its file or a Path. Of documents every word is learnt and no placeholder of a picture, of
conversations what the assistant says, with the token that ends its turn, of questions the answer and the token that
ends it. IDEFICS reads a question as a document, and the answer right behind it: the space between them is a part of
the answer. GLM-4V reads everything as a conversation, in which the user shows pictures or asks, and the assistant
writes the text. AltCLIP reads pairs alone.

What is longer than the limits is cut: tokens, pictures that lose theirs, and messages whose pictures are too many.

T tokens   I pictures   H height   W width
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from flax_vlm.processing import AltCLIPProcessor, GLM4VProcessor, IdeficsProcessor
from flax_vlm.processing.glm4v import PICTURE
from flax_vlm.processing.idefics import FAKE, IMAGE
from flax_vlm.processing.prompts import Picture, blanked, no_pixels
from flax_vlm.training.data.records import Record

Format = Literal["pairs", "documents", "conversations", "questions"]
IGNORED = -100  # a label that does not count


class Limits(NamedTuple):
    tokens: int
    images: int


class Example(NamedTuple):
    """What is made of one record; `labels` where words are learnt, `image_mask` where tokens choose among pictures."""

    input_ids: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"] | None
    pixels: Float32[np.ndarray, "I H W 3"]
    image_mask: Int32[np.ndarray, "T I"] | None


def altclip(
    processor: AltCLIPProcessor, record: Record, form: Format, limits: Limits, rng: np.random.Generator
) -> Example:
    image, text = _pair(record, rng)
    out = processor(text, images=[image], max_length=limits.tokens)
    return Example(out["input_ids"][0], None, out["pixel_values"], None)


def idefics(
    processor: IdeficsProcessor, record: Record, form: Format, limits: Limits, rng: np.random.Generator
) -> Example:
    def read(prompt: Any, **options: Any) -> dict[str, np.ndarray]:
        return processor([prompt], padding=False, transform=no_pixels, **options)

    def encode(messages: Any, add_generation_prompt: bool = False) -> np.ndarray:
        return read(messages, add_generation_prompt=add_generation_prompt)["input_ids"][0]

    if form == "conversations":
        prompt, pictures = blanked(read_messages(record, limits.images))
        out = read(prompt, add_eos_token=True)
        learnt = _answers(prompt, out["input_ids"][0], encode)
    elif form == "questions":
        messages, pictures = blanked(read_question(record, limits.images, rng))
        parts = [part for message in messages for part in message["content"]]
        *question, answer = [part["image" if _is_picture(part) else "text"] for part in parts]
        closed = [*question[:-1], question[-1] + answer] if isinstance(question[-1], str) else [*question, answer]
        out = read(closed, add_eos_token=True, add_end_of_utterance_token=False)
        begin = _begins_with(out["input_ids"][0], read(question, add_end_of_utterance_token=False)["input_ids"][0])
        learnt = np.arange(len(out["input_ids"][0])) >= begin
    else:
        items, is_whole = _items(record, form, limits.images, rng)
        prompt, pictures = blanked(items)
        out = read(prompt, add_eos_token=is_whole, add_end_of_utterance_token=False)
        placeholders = [processor.tokenizer.backend.token_to_id(token) for token in (FAKE, IMAGE)]
        learnt = ~np.isin(out["input_ids"][0], [index for index in placeholders if index is not None])
    mask = out["image_attention_mask"][0] if pictures else np.zeros((len(learnt), 0), np.int32)
    return _example(processor, out["input_ids"][0], learnt, mask, pictures, (IMAGE,), limits)


def glm4v(processor: GLM4VProcessor, record: Record, form: Format, limits: Limits, rng: np.random.Generator) -> Example:
    if form == "conversations":
        messages = read_messages(record, limits.images)
    elif form == "questions":
        messages = read_question(record, limits.images, rng)
    else:
        messages = _shown_and_told(_items(record, form, limits.images, rng)[0])
    prompt, pictures = blanked(messages)

    def encode(messages: Any, add_generation_prompt: bool = False) -> np.ndarray:
        out = processor([messages], padding=False, transform=no_pixels, add_generation_prompt=add_generation_prompt)
        return out["input_ids"][0]

    # A turn ends where another begins; the model stops when it says that the user's does.
    user: Any = processor.tokenizer.backend.token_to_id("<|user|>")
    ids = np.append(encode(prompt), np.int32(user))
    return _example(processor, ids, _answers(prompt, ids, encode, closing=1), None, pictures, PICTURE, limits)


LAYOUTS: Mapping[str, Callable[[Any, Record, Format, Limits, np.random.Generator], Example]] = {
    "altclip": altclip,
    "idefics": idefics,
    "glm4v": glm4v,
}


def _example(
    processor: IdeficsProcessor | GLM4VProcessor,
    ids: Int32[np.ndarray, " T"],
    learnt: Bool[np.ndarray, " T"],
    image_mask: Int32[np.ndarray, "T I"] | None,
    pictures: Sequence[Picture],
    placeholders: Sequence[str],
    limits: Limits,
) -> Example:
    """Cuts the row, never within the placeholders of a picture, and opens the pictures that are left."""
    begins = np.flatnonzero(ids == processor.tokenizer.backend.token_to_id(placeholders[0]))
    length = min([len(ids), limits.tokens, *begins[begins + len(placeholders) > limits.tokens]])
    ids, learnt, number = ids[:length], learnt[:length], int((begins < length).sum())
    learnt[:1] = False  # nothing comes before it: in a packed row it would be another's to predict
    if not learnt.any():
        raise ValueError(f"expected something to learn in the first {limits.tokens} tokens, found nothing")
    pixels = np.zeros((0, 0, 0, 3), np.float32)
    if number:
        if processor.image_processor is None:
            raise ValueError("expected texts alone for a model of text, got pictures")
        pixels = processor.image_processor(list(pictures[:number]))
    mask = None if image_mask is None else image_mask[:length, :number]
    return Example(ids, np.where(learnt, ids, np.int32(IGNORED)), pixels, mask)


def _answers(
    messages: Sequence[Mapping[str, Any]],
    ids: Int32[np.ndarray, " T"],
    encode: Callable[..., Int32[np.ndarray, " N"]],
    closing: int = 0,
) -> Bool[np.ndarray, " T"]:
    """Which of the chat's ids the assistant says; `closing` of those behind a message still belong to it."""
    learnt = np.zeros(len(ids), bool)

    def end_of(messages: Any, add_generation_prompt: bool = False) -> int:
        return _begins_with(ids, encode(messages, add_generation_prompt=add_generation_prompt))

    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = end_of(messages[:number], add_generation_prompt=True)
            is_last = number == len(messages) - 1
            learnt[begin : len(ids) if is_last else end_of(messages[: number + 1]) + closing] = True
    return learnt


def _begins_with(ids: Int32[np.ndarray, " T"], beginning: Int32[np.ndarray, " N"]) -> int:
    """Where what comes behind `beginning` begins."""
    if not np.array_equal(beginning, ids[: len(beginning)]):
        raise ValueError(
            "expected the ids of what precedes an answer to be the same without it, got others. Does the answer begin "
            "with a space where there has to be one?"
        )
    return len(beginning)


def _field(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise ValueError(f'expected "{name}", got {sorted(record)}')
    return record[name]


def _pair(record: Record, rng: np.random.Generator) -> tuple[Picture, str]:
    texts = record.get("texts")
    text = texts[rng.integers(len(texts))] if texts else _field(record, "text")
    return _field(record, "image"), text


def _items(record: Record, form: Format, most: int, rng: np.random.Generator) -> tuple[list[str | Picture], bool]:
    """Texts and pictures in the order of reading, and whether these are all: a picture too many ends them."""
    if form == "pairs":
        return list(_pair(record, rng)), True
    items: list[str | Picture] = []
    is_whole = True
    for image, text in zip_longest(_field(record, "images"), _field(record, "texts")):
        if (image is None) == (text is None):
            raise ValueError('expected a picture or a text at each place of "images" and "texts", null in the other')
        if text is None:
            if most == 0:
                is_whole = False
                break
            most -= 1
            items.append(image)
        elif items and isinstance(items[-1], str):
            items[-1] += "\n\n" + text
        else:
            items.append(text)
    if not any(isinstance(item, str) for item in items):
        raise ValueError(f"expected a text among the pictures, got {len(items)} of these alone")
    return items, is_whole


def _shown_and_told(items: Sequence[str | Picture]) -> list[dict[str, Any]]:
    """A document as a conversation: pictures that follow each other are one turn, and so is each text."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if not messages or messages[-1]["role"] == "assistant":
            messages.append({"role": "user", "content": [{"type": "text", "text": ""}]})
        if isinstance(item, str):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": item}]})
        else:
            messages[-1]["content"].insert(-1, {"type": "image", "image": item})
    return messages


def read_messages(record: Record, most: int) -> list[dict[str, Any]]:
    """The messages with lists as content and every picture in its place, up to the one with a picture too many."""
    messages = []
    for message in _field(record, "messages"):
        message = {key: value for key, value in message.items() if value is not None}  # as Parquet fills them up
        content = _field(message, "content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
        if "image" in message:
            parts.insert(0, {"type": "image", "image": message.pop("image")})
        messages.append(message | {"content": parts})
    pictures = list(record.get("images") or [])
    places = [part for message in messages for part in message["content"] if _is_picture(part)]
    empty = [part for part in places if part.get("image") is None]
    if pictures and not places:
        first = next((message for message in messages if message.get("role") == "user"), None)
        if first is None:
            raise ValueError("expected a message of the user, in front of which the pictures stand, found none")
        first["content"] = [{"type": "image", "image": picture} for picture in pictures] + first["content"]
    elif len(pictures) != len(empty):
        raise ValueError(f'expected a picture in "images" for each of {len(empty)} places, got {len(pictures)}')
    for part, picture in zip(empty, pictures, strict=False):
        part["image"] = picture
    seen = np.cumsum([sum(map(_is_picture, message["content"])) for message in messages])
    return [message for message, number in zip(messages, seen, strict=True) if number <= most]


def read_question(record: Record, most: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A question and an answer to it, as a conversation."""
    answers = record.get("answers")
    answer = answers[rng.integers(len(answers))] if answers else _field(record, "answer")
    question = {"role": "user", "content": _field(record, "question"), "image": record.get("image")}
    messages = [question, {"role": "assistant", "content": answer}]
    asked = read_messages({"messages": messages, "images": record.get("images")}, most)
    if not asked:
        raise ValueError(f"expected at most {most} pictures in a question, got more")
    return asked


def _is_picture(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image"
