"""Which parts of which pictures a word was read from: attention composed from the words down to the pictures' patches.

A word attends the resampler's latents, these attend what the tower made of the patches, and that has attended the
patches themselves; a word has also read the words before it, which had looked at pictures of their own. The shares are
followed through all of it by attention rollout: see `flax_vlm.models.rollout`.

B batch   T tokens   I images a row   P class token and patches   L latents   N heads
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
from flax_vlm.models.idefics.model import IdeficsForVisionText2Text, IdeficsVisionModel
from flax_vlm.models.rollout import ImageAttention, mean_of_heads, rollout, shares, with_answers

# What goes into the model beside the pictures.
_INPUTS = ("input_ids", "attention_mask", "position_ids", "image_attention_mask")


def image_attention(
    model: IdeficsForVisionText2Text,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    sequences: Any = None,
) -> ImageAttention:
    """The attention of every token, by one forward pass.

    The word at position t was chosen at t - 1: to see what it was read from, look there.

    Args:
      inputs: of the prompts, as the processor makes them, with `pixel_values`.
      sequences: prompts and answers, as `generate` returns them. Answers see what the last token of the prompt sees.

    Raises:
      ValueError: for inputs without pictures, or sequences that do not go on from them.
    """
    missing = [name for name in ("input_ids", "image_attention_mask", "pixel_values") if inputs.get(name) is None]
    if missing:
        raise ValueError(f"expected inputs with pictures, as the processor makes them; {', '.join(missing)} missing")
    given = {name: np.asarray(inputs[name]) for name in _INPUTS if inputs.get(name) is not None}
    if sequences is not None:
        given = with_answers(given, sequences)
    pixels = jnp.asarray(inputs["pixel_values"])
    patch = model.config.vision_config.patch_size
    grid = pixels.shape[2] // patch, pixels.shape[3] // patch
    composed = jax.device_get(_composed(model, params, pixels, given))
    return ImageAttention(*(each.reshape(*each.shape[:-1], *grid) for each in composed))


@partial(jax.jit, static_argnums=0)
def _composed(
    model: IdeficsForVisionText2Text, params: Mapping[str, Any], pixels: Array, inputs: Mapping[str, Array]
) -> tuple[Array, Array]:
    """`own` and `through_text`, [B, T, I, patches]."""
    config = model.config
    batch, number = pixels.shape[:2]
    resized = pixels.shape[2:4] != (config.vision_config.image_size,) * 2
    tower = IdeficsVisionModel(config.vision_config, **model.run_stack)
    seen: Any = tower.apply(
        {"params": params["model"]["vision_model"]},
        pixels.reshape(batch * number, *pixels.shape[2:]),
        interpolate_pos_encoding=resized,
        output_attentions=True,
    )
    states = seen.last_hidden_state
    read: dict[str, Any] = {**inputs, "image_encoder_embeddings": states.reshape(batch, number, *states.shape[1:])}
    outputs: Any = model.apply({"params": params}, **read, output_attentions=True, mutable=[KEPT])
    output, kept = outputs
    kept = unstack_params(kept[KEPT])["model"]
    of_patches = rollout(seen.attentions)  # [B * I, P, P]
    if config.use_resampler:
        of_patches = _resampled(kept["perceiver_resampler"], config) @ of_patches  # [B * I, L, P]
    of_patches = of_patches[..., 1:].reshape(batch, number, *of_patches.shape[1:-1], -1)

    own = through_text = jnp.zeros(())
    for look in range(config.num_hidden_layers // config.cross_layer_interval):
        weights = _mean(kept[f"gated_cross_attn_layers_{look}"]["cross_attn"])  # [B, T, I * L]
        weights = weights.reshape(*weights.shape[:2], number, -1)
        looked = jnp.einsum("btil,bilp->btip", weights, of_patches)
        own += looked
        through_text += looked
        interval = slice(look * config.cross_layer_interval, (look + 1) * config.cross_layer_interval)
        for layer in output.attentions[interval]:
            taken = jnp.einsum("bts,bsip->btip", mean_of_heads(layer), through_text)
            through_text = (through_text + taken) / 2
    return shares(own), shares(through_text)


def _resampled(kept: Mapping[str, Any], config: Any) -> Float[Array, "B L P"]:
    """What each latent has of each token of the tower. What it was before it saw any is of no picture."""
    sizes = config.perceiver_config
    latents = sizes.resampler_n_latents
    blocks = [_mean(kept[f"blocks_{block}"]["attn"]) for block in range(sizes.resampler_depth)]
    taken = jnp.zeros_like(blocks[0][..., :-latents])
    for weights in blocks:  # of the tower's tokens, then of the latents themselves
        taken = (taken + weights[..., :-latents] + weights[..., -latents:] @ taken) / 2
    return taken / taken.sum(-1, keepdims=True)


def _mean(kept: Mapping[str, Any]) -> Array:
    """Over the heads, in float32."""
    (weights,) = kept["weights"]
    return mean_of_heads(weights)
