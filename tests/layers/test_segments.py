"""Positions in rows of several documents."""

import jax.numpy as jnp
import pytest

from flax_vlm.layers.segments import check_segments, count_positions

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 3, 0], [0, 0, 1, 1, 2, 2, 2]])


def test_positions_begin_anew_in_each_segment() -> None:
    positions = count_positions(SEGMENTS != 0, SEGMENTS)
    assert positions[0, :6].tolist() == [0, 1, 2, 0, 1, 0] and positions[1, 2:].tolist() == [0, 1, 0, 1, 2]


def test_padding_within_a_segment_has_no_position() -> None:
    is_token = jnp.array([[True, False, True, False, True, True, False]] * 2)
    positions = count_positions(is_token, SEGMENTS)
    assert positions[0, jnp.array([0, 2, 4, 5])].tolist() == [0, 1, 0, 0]
    assert positions[1, jnp.array([2, 4, 5])].tolist() == [0, 0, 1]


def test_without_segments_the_row_is_one() -> None:
    is_token = jnp.array([[False, False, True, True, False, True]])
    assert count_positions(is_token)[0, jnp.array([2, 3, 5])].tolist() == [0, 1, 2]


def test_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"segment_ids have shape \(2, 7\): expected \(2, 6\)"):
        check_segments(SEGMENTS, (2, 6), False)
    with pytest.raises(ValueError, match="a cache goes on with one document a row"):
        check_segments(SEGMENTS, (2, 7), True)
