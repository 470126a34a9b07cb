"""Rows in batches: each once, whatever the batch; and bad ones put aside, whoever finds them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from flax_vlm import inference
from flax_vlm.inference import Bad, Mapped, Size
from flax_vlm.inference.engine import Batch


class Doubling:
    """A work to which a row is a number, of so many tokens; what is above 100 cannot be measured, 13 not be read."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], Size]] = []

    def measure(self, item: int, /) -> Size:
        if item > 100:
            raise ValueError(f"{item} is\n too much")
        return Size(item, item % 4)

    def read(self, items: list[int], size: Size, /) -> list[int]:
        if 13 in items:
            raise OSError("a bad picture")
        assert max(items) <= size.tokens and max(item % 4 for item in items) <= size.images
        return items

    def compute(self, inputs: list[int], rows: Sequence[int], /) -> list[int]:
        self.batches.append((inputs, Size(len(inputs), len(rows))))
        return [2 * item for item in inputs]


def through(items: Sequence[Any], batch_size: int) -> tuple[dict[int, Any], list[Batch], Doubling]:
    work = Doubling()
    sizes, bad = inference.measure(work, items)
    plan = inference.make_plan(sizes, batch_size)
    found = [*bad.items(), *(each for batch in inference.run(work, items, plan) for each in batch)]
    assert sorted(row for row, _ in found) == list(range(len(items))), "each row once"
    return dict(found), plan, work


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_every_row_once_whatever_the_batch(batch_size: int) -> None:
    items = np.random.default_rng(0).permutation(np.arange(14, 60)).tolist()
    found, plan, work = through(items, batch_size)
    assert found == {row: 2 * item for row, item in enumerate(items)}
    width = min(batch_size, len(items))
    assert {batch.width for batch in plan} == {width}
    assert all(size == (width, width) for _, size in work.batches), "the last one is filled up"


def test_a_plan_has_the_largest_first_and_few_shapes() -> None:
    sizes = np.array([[3, 0], [9, 3], [5, 1], [-1, -1], [7, 4], [4, 0], [8, 1]], np.int32)
    plan = inference.make_plan(sizes, 2)
    assert plan == [
        Batch((1, 4), Size(9, 4), 2),  # three pictures have the room of four
        Batch((6, 2), Size(8, 1), 2),
        Batch((5, 0), Size(4, 0), 2),
    ]
    assert inference.make_plan(sizes[3:4], 2) == []
    assert inference.make_plan(sizes[:1], 8, ways=4)[0].width == 4
    for size, ways in ((0, 1), (6, 4)):
        with pytest.raises(ValueError, match=f"batch_size is {size}: expected a multiple of the {ways} devices"):
            inference.make_plan(sizes, size, ways)


def test_bad_rows_are_found_and_no_others() -> None:
    seen = Mapped(lambda item: 1 / (item - 7) and item, [13, 20, 7, 101, 22, 13, 21])
    found, _, work = through(seen, 4)
    assert [found.pop(row) for row in (1, 4, 6)] == [40, 44, 42]
    assert found == {
        0: Bad("OSError: a bad picture"),
        2: Bad("ZeroDivisionError: division by zero"),
        3: Bad("ValueError: 101 is too much"),
        5: Bad("OSError: a bad picture"),
    }
    assert all(len(inputs) == 4 and 13 not in inputs for inputs, _ in work.batches)
    assert through([13, 13], 2)[2].batches == [], "nothing is left to compute"


def test_a_fault_of_no_row_is_raised() -> None:
    class Broken(Doubling):
        def read(self, items: list[int], size: Size, /) -> list[int]:
            if len(items) > 1:
                raise RuntimeError("out of memory")
            return items

    with pytest.raises(RuntimeError, match="out of memory"):
        list(inference.run(Broken(), [1, 2], [Batch((0, 1), Size(2, 2), 2)]))


def test_in_order() -> None:
    told: list[int] = []
    assert inference.in_order(Doubling(), [5, 1, 12, 2, 3], 2, told.append) == [10, 2, 24, 4, 6]
    assert sum(told) == 5
    for items, message in (
        ([], "expected at least one row, came none"),
        ([1, 13], "row 1, counted from 0: OSError: a bad picture"),
        ([1, 200], "row 1, counted from 0: ValueError: 200 is too much"),
    ):
        with pytest.raises(ValueError, match=message):
            inference.in_order(Doubling(), items, 2)
