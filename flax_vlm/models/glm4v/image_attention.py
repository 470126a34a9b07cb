"""Which parts of which pictures a word was read from: attention composed from the words down to the tower's patches.

In GLM-4V the vectors of a picture stand among the words, so one attention reads both: a word attends vectors, and words
that have attended vectors. Each vector was made of two by two tokens of the tower, which had attended all patches. The
shares are followed through all of it by attention rollout: see `flax_vlm.models.rollout`.

B batch   L ids   S slots   I images a row   M vectors and P patches a picture   T class token and patches
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flax_vlm.layers.kept_weights import KEPT
from flax_vlm.layers.stack import unstack_params
from flax_vlm.models.glm4v.config import GLM4VVisionConfig
from flax_vlm.models.glm4v.model import GLM4VForConditionalGeneration
from flax_vlm.models.glm4v.splice import Slots
from flax_vlm.models.rollout import ImageAttention, mean_of_heads, rollout, shares, with_answers


def image_attention(
    model: GLM4VForConditionalGeneration,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    sequences: Any = None,
    *,
    through_tower: bool = True,
) -> ImageAttention:
    """The attention of every id, by one forward pass; that of a picture's placeholder is that of its last patch.

    The word at position t was chosen at t - 1: to see what it was read from, look there.

    Args:
      inputs: of the prompts, as the processor makes them, with `images`.
      sequences: prompts and answers, as `generate` returns them.
      through_tower: follow the tower's attention too. Without it a vector is of its own two by two patches alone. (A
        tower may gather much in few patches, whatever is asked, and these outshine where the decoder looks.)

    Raises:
      ValueError: for inputs without pictures, or sequences that do not go on from them.
    """
    vision = model.config.vision_config
    if vision is None or inputs.get("images") is None or inputs.get("input_ids") is None:
        raise ValueError(f"expected ids and images, as the processor makes them; came {sorted(inputs)}")
    names = ("input_ids", "attention_mask", "position_ids")
    given = {name: np.asarray(inputs[name]) for name in names if inputs.get(name) is not None}
    if sequences is not None:
        given = with_answers(given, sequences)
    composed = jax.device_get(_composed(model, through_tower, params, jnp.asarray(inputs["images"]), given))
    return ImageAttention(*(each.reshape(*each.shape[:-1], vision.grid, vision.grid) for each in composed))


@partial(jax.jit, static_argnums=(0, 1))
def _composed(
    model: GLM4VForConditionalGeneration,
    through_tower: bool,
    params: Mapping[str, Any],
    images: Array,
    inputs: Mapping[str, Array],
) -> tuple[Array, Array]:
    """`own` and `through_text`, [B, L, I, P]."""
    vision: Any = model.config.vision_config
    read: dict[str, Any] = {**inputs, "images": images, "output_attentions": True, "logits_to_keep": 1}
    outputs: Any = model.apply({"params": params}, **read, mutable=[KEPT])
    output, kept = outputs
    layers = unstack_params(kept[KEPT])["transformer"]["vision"]["transformer"]
    tower = [layers[f"layers_{i}"]["attention"]["weights"][0] for i in range(vision.num_hidden_layers)]
    of_patches = rollout(tower if through_tower else [jnp.zeros_like(tower[0])])  # zeros: as each was
    of_slots = _of_slots(output.slots, _merged(of_patches, vision), len(inputs["input_ids"]))
    direct = jnp.mean(jnp.stack([mean_of_heads(layer) for layer in output.attentions]), axis=0)
    last = _last_slots(output.slots, inputs["input_ids"].shape[1])
    is_token = inputs.get("attention_mask", jnp.ones_like(inputs["input_ids"])) != 0

    def of_ids(weights: Float[Array, "B S S"]) -> Float[Array, "B L I P"]:
        rows = jnp.take_along_axis(weights, last[..., None], axis=1) * is_token[..., None]
        return shares(jnp.einsum("bls,bsip->blip", rows, of_slots))

    return of_ids(direct), of_ids(rollout(output.attentions))


def _merged(tower: Float[Array, "BI T T"], vision: GLM4VVisionConfig) -> Float[Array, "BI M P"]:
    """Each vector's shares of the patches: the mean of the two by two tokens that it was made of.

    What these have of the class token is of no patch.
    """
    half = vision.grid // 2
    rows = tower[:, 1:, 1:].reshape(len(tower), half, 2, half, 2, -1)
    taken = rows.mean((2, 4)).reshape(len(tower), half * half, -1)
    return taken / taken.sum(-1, keepdims=True)


def _of_slots(slots: Slots, of_vectors: Float[Array, "BI M P"], batch: int) -> Float[Array, "B S I P"]:
    """What each slot has of each patch before the decoder: its own vector's, of its own picture."""
    vectors = of_vectors.shape[1]
    flat = of_vectors.reshape(batch, -1, of_vectors.shape[2])
    picture, place = jnp.divmod(slots.vector, vectors + 2)  # with begin and end around them
    index = jnp.where(slots.is_patch, picture * vectors + place - 1, 0)
    own = jnp.take_along_axis(flat, index[..., None], axis=1) * slots.is_patch[..., None]
    pictures = jnp.arange(flat.shape[1] // vectors)
    return own[:, :, None] * (picture[..., None] == pictures)[..., None]


def _last_slots(slots: Slots, ids: int) -> Array:
    """The last slot of each id, [B, L]."""
    belongs = slots.token[:, None] == jnp.arange(ids)[None, :, None]
    return jnp.where(belongs, jnp.arange(slots.token.shape[1]), 0).max(-1)
