"""Examples in rows of a fixed length, several to a row.

    row 0   <s> A dog. </s> <s> A cat </s> .      input_ids, with padding at the end
             1  1  1    1    2  2  2   2   0      segment_ids: no token attends one of another segment
             .  A dog. </s>  .  A cat </s> .      labels: nothing predicts what begins a segment

B rows   T tokens a row   I pictures a row   H height   W width
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Shaped

from flax_vlm.training.data.examples import IGNORED, Example, Limits

Name = TypeVar("Name")

OPEN_ROWS = 8  # that wait for more; what they hold is read again when a run goes on


@dataclass
class Row(Generic[Name]):
    """What shares a row, under the names it was given."""

    names: list[Name] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    @property
    def size(self) -> Limits:
        """The tokens and pictures in it."""
        return Limits(
            sum(len(each.input_ids) for each in self.examples), sum(len(each.pixels) for each in self.examples)
        )

    def add(self, name: Name, example: Example) -> None:
        self.names.append(name)
        self.examples.append(example)


class Packer(Generic[Name]):
    """Puts each example into the first open row with room for it; where none has any, the fullest row is done."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rows: list[Row[Name]] = []

    def add(self, name: Name, example: Example) -> Row[Name] | None:
        """The row that is done, if one had to make place."""
        tokens, images = len(example.input_ids), len(example.pixels)
        done = None
        for row in self.rows:
            size = row.size
            if size.tokens + tokens <= self.limits.tokens and size.images + images <= self.limits.images:
                break
        else:
            if len(self.rows) == OPEN_ROWS:
                done = max(self.rows, key=lambda row: row.size.tokens)
                self.rows.remove(done)
            row = Row()
            self.rows.append(row)
        row.add(name, example)
        return done


def lay_out(
    rows: Sequence[Sequence[Example]], limits: Limits, picture: tuple[int, ...], padding: int
) -> dict[str, Shaped[np.ndarray, "B ..."]]:
    """The arrays of a batch: `input_ids`, `segment_ids` [B, T], `pixels` [B, I, H, W, 3], and where the examples have
    them `labels` [B, T] and `image_mask` [B, T, I]."""
    batch, (length, images) = len(rows), limits
    out = {
        "input_ids": np.full((batch, length), padding, np.int32),
        "segment_ids": np.zeros((batch, length), np.int32),
        "labels": np.full((batch, length), IGNORED, np.int32),
        "image_mask": np.zeros((batch, length, images), np.int32),
        "pixels": np.zeros((batch, images, *picture), np.float32),
    }
    for b, row in enumerate(rows):
        token = image = 0
        for segment, example in enumerate(row, 1):
            tokens = slice(token, token := token + len(example.input_ids))
            pictures = slice(image, image := image + len(example.pixels))
            out["input_ids"][b, tokens] = example.input_ids
            out["segment_ids"][b, tokens] = segment
            if example.labels is not None:
                out["labels"][b, tokens] = example.labels
            if example.image_mask is not None:
                out["image_mask"][b, tokens, pictures] = example.image_mask
            if len(example.pixels):
                out["pixels"][b, pictures] = example.pixels
    return out
