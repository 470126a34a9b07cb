"""Attention composed from layer to layer, for the `image_attention` of models that read pictures.

Attention rollout (Abnar and Zuidema, arXiv:2005.00928): heads count alike, and what a layer leaves as it was counts as
much as what it attends. It is a picture of where information could flow, and no proof that it was used: hide what is
hot and see whether the answer changes.

B batch   T tokens   I images a row   N heads   S tokens of a tower, or slots
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class ImageAttention(NamedTuple):
    """Shares of the patches, which add up to 1 over all pictures of a row, or to 0 where a token could see none.

    Attributes:
      own: where a token looks itself, on the mean of all looks.
      through_text: and where the tokens looked that it has read from.
    """

    own: Float[np.ndarray, "B T I rows columns"]
    through_text: Float[np.ndarray, "B T I rows columns"]


def with_answers(given: Mapping[str, np.ndarray], sequences: Any) -> dict[str, np.ndarray]:
    """Inputs of prompts, with their answers behind them; what else a token has is that of the prompt's last.

    Raises:
      ValueError: for sequences that do not go on from the prompts.
    """
    ids, whole = given["input_ids"], np.asarray(sequences)
    new = whole.shape[-1] - ids.shape[1]
    if whole.shape[0] != len(ids) or new < 0 or not np.array_equal(whole[:, : ids.shape[1]], ids):
        raise ValueError(
            f"sequences have shape {whole.shape}: expected the prompts {ids.shape} with their answers behind them, "
            "one a prompt"
        )
    longer = {name: np.pad(array, _behind(array, new), mode="edge") for name, array in given.items()}
    longer.pop("position_ids", None)  # counted anew
    return longer | {"input_ids": whole}


def _behind(array: np.ndarray, number: int) -> list[tuple[int, int]]:
    """So many more tokens, for `np.pad`."""
    return [(0, number if axis == 1 else 0) for axis in range(array.ndim)]


def rollout(layers: Sequence[Float[Array, "B N S S"]]) -> Float[Array, "B S S"]:
    """What each token of the output has of each token that went in."""
    same = jnp.eye(layers[0].shape[-1])
    whole = same
    for layer in layers:
        whole = (mean_of_heads(layer) + same) / 2 @ whole
    return whole


def mean_of_heads(weights: Float[Array, "B N T S"]) -> Float[Array, "B T S"]:
    return weights.mean(1).astype(jnp.float32)


def shares(taken: Float[Array, "B T I P"]) -> Float[Array, "B T I P"]:
    """Of what each token has taken from pictures."""
    whole = taken.sum((-2, -1), keepdims=True)
    return jnp.where(whole > 0, taken / jnp.where(whole > 0, whole, 1), 0)
