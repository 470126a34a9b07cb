"""Rows of several examples: every token once, nothing across a border."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flax_vlm.training.data.examples import Example, Limits
from flax_vlm.training.data.packing import OPEN_ROWS, Packer, lay_out

LIMITS, PICTURE = Limits(17, 5), (2, 3, 3)
SIZES = st.lists(st.tuples(st.integers(2, LIMITS.tokens), st.integers(0, LIMITS.images)), max_size=60)


def example(number: int, tokens: int, images: int) -> Example:
    """One that no other is equal to."""
    ids = np.arange(tokens, dtype=np.int32) + 100 * number + 1
    mask = (ids[:, None] + np.arange(images)) % 2
    pixels = np.broadcast_to((10 * number + np.arange(images) + 1.0)[:, None, None, None], (images, *PICTURE))
    return Example(ids, np.where(np.arange(tokens) == 0, -100, ids), pixels.astype(np.float32), mask.astype(np.int32))


@given(SIZES)
def test_every_example_is_in_one_row(sizes: list[tuple[int, int]]) -> None:
    packer: Packer[int] = Packer(LIMITS)
    rows = [packer.add(number, example(number, *size)) for number, size in enumerate(sizes)]
    assert len(packer.rows) <= OPEN_ROWS
    rows = [row for row in rows if row] + packer.rows
    assert sorted(name for row in rows for name in row.names) == list(range(len(sizes)))
    for row in rows:
        assert row.names == sorted(row.names)
        assert row.size.tokens == sum(sizes[name][0] for name in row.names) <= LIMITS.tokens
        assert row.size.images == sum(sizes[name][1] for name in row.names) <= LIMITS.images


def test_rows_fill_up() -> None:
    """Two short ones share a row behind a long one, and the fullest makes place."""
    packer: Packer[str] = Packer(Limits(10, 1))
    names = {"long": (9, 0), "short": (4, 0), "seen": (6, 1), "seen too": (2, 1)}
    for number, (name, size) in enumerate(names.items()):
        assert packer.add(name, example(number, *size)) is None
    assert [row.names for row in packer.rows] == [["long"], ["short", "seen"], ["seen too"]]
    for number in range(OPEN_ROWS - 3):
        assert packer.add(f"alone {number}", example(number, 8 - number, 1)) is None
    done = packer.add("late", example(9, 10, 0))
    assert done is not None and done.names == ["short", "seen"] and packer.rows[-1].names == ["late"]


@given(st.lists(SIZES.filter(len), min_size=1, max_size=3))
def test_a_row_is_its_examples(batch: list[list[tuple[int, int]]]) -> None:
    rows, number = [], 0
    for sizes in batch:
        rows.append([])
        for tokens, images in sizes:
            held = rows[-1]
            if sum(len(each.input_ids) for each in held) + tokens <= LIMITS.tokens and (
                sum(len(each.pixels) for each in held) + images <= LIMITS.images
            ):
                held.append(example(number, tokens, images))
                number += 1
    out = lay_out(rows, LIMITS, PICTURE, padding=-7)
    for b, row in enumerate(rows):
        ids, labels, segments = (out[name][b] for name in ("input_ids", "labels", "segment_ids"))
        assert segments.tolist() == [n for n, each in enumerate(row, 1) for _ in each.input_ids] + [0] * np.sum(
            segments == 0
        )
        assert (ids[segments == 0] == -7).all() and (labels[segments == 0] == -100).all()
        image = 0
        for segment, each in enumerate(row, 1):
            own = segments == segment
            np.testing.assert_array_equal(ids[own], each.input_ids)
            np.testing.assert_array_equal(labels[own], each.labels)
            assert labels[own][0] == -100  # what stands before it is another's
            columns = np.arange(image, image + len(each.pixels))
            np.testing.assert_array_equal(out["pixels"][b][columns], each.pixels)
            np.testing.assert_array_equal(out["image_mask"][b][own][:, columns], each.image_mask)
            assert not np.delete(out["image_mask"][b][own], columns, axis=1).any()
            image += len(each.pixels)
        assert not out["pixels"][b][image:].any() and not out["image_mask"][b][segments == 0].any()
