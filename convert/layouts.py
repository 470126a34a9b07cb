"""Which table reads a checkpoint for a model: its own, or that of a larger model it is part of."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flax_vlm.models import registry

from . import altclip, glm4v, idefics
from .rules import Drop, Row, Rule, match

TABLES: dict[str, tuple[Row, ...]] = {**altclip.TABLES, **glm4v.TABLES, **idefics.TABLES}
_TIED = idefics.TIED_TABLES
_OTHER_SPELLINGS = glm4v.OTHER_SPELLINGS


def table(model: str, config: Any = None) -> tuple[Row, ...]:
    """The table of the model of that name; a head tied to the embeddings has no parameters of its own."""
    return _TIED.get(model, TABLES[model]) if getattr(config, "tie_word_embeddings", False) else TABLES[model]


def within(rows: Iterable[Row], flax_prefix: str, part: str) -> tuple[Row, ...]:
    """The table of a whole model, read for the part of it under `flax_prefix`: every other tensor is dropped."""

    def inner(row: Row) -> Row:
        if isinstance(row, Rule) and all(path.startswith(flax_prefix) for path in row.parts):
            return replace(row, flax=tuple(path.removeprefix(flax_prefix) for path in row.parts))
        return Drop(row.torch, f"not in {part}")

    return tuple(map(inner, rows))


def layout_for(model: str, names: Iterable[str], config: Any = None) -> tuple[Row, ...]:
    """The table under which most of a checkpoint's `names` fill parameters of `model`.

    A tower may be saved alone, under its prefix, or inside the whole model; each is read by the same rows.
    """
    candidates = [table(model, config)]
    candidates += [within(table(whole, config), prefix, model) for whole, prefix in registry.wholes_of(model).items()]
    candidates += _OTHER_SPELLINGS.get(model, ())
    names = list(names)

    def filled(rows: tuple[Row, ...]) -> int:
        found = (match(rows, name) for name in names)
        return sum(hit is not None and isinstance(hit[0], Rule) for hit in found)

    return max(candidates, key=filled)
