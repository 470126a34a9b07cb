"""Where pictures stand among the words.

A prompt names a picture by three ids: begin, a placeholder, end. The vision model's vectors, one for begin, P for the
patches and one for end, take their slots: the placeholder becomes P of them, which share its one position. A row of L
ids with k pictures fills L + k (P - 1) slots. One width serves the batch, that of I pictures a row: a row with fewer of
them begins with (I - k)(P - 1) masked slots. So the last slot is always that of the last id.

    L = 6, P = 3, I = 1      ids            w [ # ] w w          w w w w w w
                             slots          w [ # # # ] w w      . . w w w w w w
                             positions      0 1 2 2 2 3 4 5      . . 0 1 2 3 4 5

Pictures may come anywhere, in later turns too, and several to a row (THUDM's code wants exactly one in every row):
position and slots of each follow from the rule.

B batch   L ids   S slots   I pictures a row   P patches a picture   D width
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Shaped

from flax_vlm.layers.losses import IGNORED

NO_VECTOR = -1  # of a slot where a word stands


class Slots(struct.PyTreeNode):
    """What each slot holds.

    Attributes:
      token: the id that it belongs to.
      is_there: not one that only fills the row.
      is_patch, is_picture: whether a patch stands there, or any vector of the vision model.
      vector: which of the row's I * (P + 2) vectors it is.
      fits: whether a row's ids name pictures as they should.
    """

    token: Int[Array, "B S"]
    is_there: Bool[Array, "B S"]
    is_patch: Bool[Array, "B S"]
    is_picture: Bool[Array, "B S"]
    vector: Int[Array, "B S"]
    fits: Bool[Array, " B"]

    def spread(self, values: Shaped[Array, "B L *D"]) -> Shaped[Array, "B S *D"]:
        """Each slot's own of what there is one of for each id."""
        return jnp.take_along_axis(values, self.token.reshape(*self.token.shape, *[1] * (values.ndim - 2)), axis=1)

    def labels(self, labels: Int[Array, "B L"]) -> Int[Array, "B S"]:
        """Those of the ids; patches and what fills the row do not count."""
        return jnp.where(self.is_patch | ~self.is_there, IGNORED, self.spread(labels))


def splice(
    input_ids: Int[Array, "B L"], is_token: Bool[Array, "B L"], begin: int, end: int, images: int, patches: int
) -> Slots:
    """The slots of a batch with `images` pictures a row, some of which may go unused."""
    _, triples, fits = _pictures(input_ids, is_token, begin, end, images)
    length = input_ids.shape[1]
    opens, placeholder, closes = (jnp.pad(triples, ((0, 0), (by, 2 - by)))[:, :length] for by in range(3))
    widths = jnp.where(placeholder, patches, 1)
    spare = (images - triples.sum(-1, keepdims=True)) * (patches - 1)
    ends = spare + widths.cumsum(-1)

    slots = jnp.arange(length + images * (patches - 1))
    token = jax.vmap(lambda ends: jnp.searchsorted(ends, slots, side="right"))(ends)
    token = jnp.minimum(token, length - 1)  # rows that do not fit may end early

    def take(values: Array) -> Array:
        return jnp.take_along_axis(values, token, axis=1)

    is_there = slots >= spare
    is_patch = take(placeholder) & is_there
    vector = jnp.where(is_patch, 1 + slots - take(ends - widths), jnp.where(take(closes), patches + 1, 0))
    picture = take(opens.cumsum(-1)) - 1
    return Slots(
        token=token,
        is_there=is_there,
        is_patch=is_patch,
        is_picture=take(opens | placeholder | closes) & is_there,
        vector=picture * (patches + 2) + vector,
        fits=fits,
    )


def lay_out(
    input_ids: np.ndarray, is_token: np.ndarray, begin: int, end: int, patches: int
) -> dict[str, Int[np.ndarray, "1 S"]]:
    """The slots of one row whose pictures fit, on the host: id, mask and position of each, and the vector it holds."""
    _, triples, _ = _pictures(input_ids, is_token, begin, end, 0)
    begins = np.flatnonzero(triples[0])
    widths = np.ones(input_ids.shape[1], int)
    widths[begins + 1] = patches
    token = np.repeat(np.arange(len(widths)), widths)[None]
    vector = np.full(token.shape, NO_VECTOR)
    for picture, at in enumerate(begins + np.arange(len(begins)) * (patches - 1)):
        vector[0, at : at + patches + 2] = picture * (patches + 2) + np.arange(patches + 2)
    positions = np.maximum(np.cumsum(is_token != 0, axis=-1) - 1, 0)
    along = {"input_ids": input_ids, "attention_mask": is_token, "position_ids": positions}
    return {name: np.take_along_axis(array, token, axis=1) for name, array in along.items()} | {"image_slots": vector}


def check_pictures(input_ids: np.ndarray, is_token: np.ndarray, begin: int, end: int, images: int) -> None:
    """Raises ValueError for rows whose ids do not name pictures as they should."""
    opens, triples, fits = _pictures(input_ids, is_token, begin, end, images)
    if not fits.all():
        row = int(fits.argmin())
        raise ValueError(
            f"row {row} of input_ids has {opens[row].sum()} begins of a picture ({begin}), {triples[row].sum()} of "
            f"them with its end ({end}) behind one placeholder: expected that of all, and no more than the {images} "
            "pictures that came"
        )


def _pictures(input_ids: Any, is_token: Any, begin: int, end: int, images: int) -> tuple[Any, Any, Any]:
    """Of numpy or JAX arrays: begins [B, L], those with an end two ids on [B, L - 2], and the rows that fit [B]."""
    opens = (input_ids == begin) & is_token
    triples = opens[:, :-2] & (input_ids[:, 2:] == end)
    number = triples.sum(-1)
    within = (triples[:, 1:] & triples[:, :-1]).any(-1)  # begin, begin, end, end
    return opens, triples, (number == opens.sum(-1)) & (number <= images) & ~within
