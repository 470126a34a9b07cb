"""Batch inference: any number of rows through a model, in few shapes, each of them once."""

from flax_vlm.inference.engine import Bad, Mapped, Size, Work, in_order, make_plan, measure, run
from flax_vlm.inference.row_file import RowFile, row_file
from flax_vlm.inference.works import Answer, Answers, PictureVectors, TextVectors, embed, unit

__all__ = [
    "Answer",
    "Answers",
    "Bad",
    "Mapped",
    "PictureVectors",
    "RowFile",
    "Size",
    "TextVectors",
    "Work",
    "embed",
    "in_order",
    "make_plan",
    "measure",
    "row_file",
    "run",
    "unit",
]
