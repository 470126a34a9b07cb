"""Several documents in one row, each a segment: `segment_ids` number them from 1 on, 0 is padding.

    segment_ids    1 1 1 2 2 0 0      positions      0 1 2 0 1 . .

A token attends tokens of its own segment only (`attention.segment_mask`), and the last one of a segment predicts
nothing (`losses`): a row is what its documents would be alone.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def count_positions(is_token: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """The number of tokens before each, in its own segment; that of the row without segments."""
    before = is_token.cumsum(-1) - is_token
    if segment_ids is None:
        return before
    starts = jnp.diff(segment_ids, axis=-1, prepend=-1) != 0
    return before - lax.cummax(jnp.where(starts, before, 0), axis=1)


def check_segments(segment_ids: Int[Array, "..."], tokens: tuple[int, ...], cached: bool) -> None:
    """Raises ValueError for segments of another shape than `tokens`, [B, T], or together with a cache."""
    if segment_ids.shape != tokens:
        raise ValueError(f"segment_ids have shape {segment_ids.shape}: expected {tokens} as the tokens")
    if cached:
        raise ValueError("segment_ids are for rows that are read at once: a cache goes on with one document a row")
