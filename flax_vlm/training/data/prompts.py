"""From a record to what a model is asked; what the record has for an answer is left out.

    conversations  what stands before the last message of the assistant; all where another says the last
    questions      the pictures and the question
    pairs          the picture, whose text is not told

Without a template this is a chat, which the model has a layout for; with one a list of pictures and texts.
"""

import sys
from typing import Any

import numpy as np

from flax_vlm.training.data.examples import read_messages, read_question
from flax_vlm.training.data.records import Record


def read_prompt(record: Record, template: str | None = None) -> list[Any]:
    """A prompt for the processor.

    Args:
      template: a text to put the question in, with {} as its place, or what is said behind the picture of a pair.

    Raises:
      ValueError: for records of other kinds, and a template that does not belong to this one.
    """
    if record.get("messages") is not None:
        if template is not None:
            raise ValueError("template: expected none for conversations, which the model has a layout for")
        messages = read_messages(record, sys.maxsize)
        return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    question, images = record.get("question"), record.get("images") or [record.get("image")]
    if isinstance(question, list):
        return _mixed_question(record, template)
    if images == [None]:
        raise ValueError(f"expected 'messages' or 'image' in a record, came {sorted(record)}")
    if template is not None:
        if question is None and "{}" in template:
            raise ValueError(f"template: expected no {{}} for a picture without a question, came {template!r}")
        return [*images, template.replace("{}", question or "")]
    content = [{"type": "image", "image": image} for image in images]
    content += [] if question is None else [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _mixed_question(record: Record, template: str | None) -> list[Any]:
    """One with pictures among its texts."""
    unanswered = {**record, "answers": None, "answer": ""}
    asked, _ = read_question(unanswered, sys.maxsize, np.random.default_rng(0))
    if template is None:
        return [asked]
    if template != "{}":
        raise ValueError(f"template: expected '{{}}' for a question with pictures among its texts, came {template!r}")
    return [part.get("image", part.get("text")) for part in asked["content"]]
