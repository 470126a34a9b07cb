"""Which parts of which pictures a word was read from: attention composed from the words down to the pictures' patches.

A word attends the resampler's latents, these attend what the tower made of the patches, and that has attended the
patches themselves; a word has also read the words before it, which had looked at pictures of their own. The shares are
followed through all of it by attention rollout (Abnar and Zuidema, arXiv:2005.00928): heads count alike, and what a
layer leaves as it was counts as much as what it attends. It is a picture of where information could flow, and no proof
that it was used: hide what is hot and see whether the answer changes.

B batch   T tokens   I images a row   P class token and patches   L latents   N heads
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flax_vlm.layers.kept_weights import KEPT
from flax_vlm.layers.stack import unstack_params
from flax_vlm.models.idefics.model import IdeficsForVisionText2Text, IdeficsVisionModel

# What goes into the model beside the pictures.
_INPUTS = ("input_ids", "attention_mask", "position_ids", "image_attention_mask")


class ImageAttention(NamedTuple):
    """Shares of the patches, which add up to 1 over all pictures of a row, or to 0 where a token could see none.

    Attributes:
      own: where a token looks itself, on the mean of all looks.
      through_text: and where the tokens looked that it has read from.
    """

    own: Float[np.ndarray, "B T I rows columns"]
    through_text: Float[np.ndarray, "B T I rows columns"]


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
    ids = np.asarray(inputs["input_ids"])
    given = {name: np.asarray(inputs[name]) for name in _INPUTS if inputs.get(name) is not None}
    if sequences is not None:
        whole = np.asarray(sequences)
        new = whole.shape[-1] - ids.shape[1]
        if whole.shape[0] != len(ids) or new < 0 or not np.array_equal(whole[:, : ids.shape[1]], ids):
            raise ValueError(
                f"sequences have shape {whole.shape}: expected the prompts {ids.shape} with their answers behind them, "
                "one a prompt"
            )
        given.pop("position_ids", None)  # counted anew
        given = {name: np.pad(array, _behind(array, new), mode="edge") for name, array in given.items()}
        given["input_ids"] = whole
    pixels = jnp.asarray(inputs["pixel_values"])
    own, through_text = jax.device_get(_composed(model, params, pixels, given))
    patch = model.config.vision_config.patch_size
    grid = pixels.shape[2] // patch, pixels.shape[3] // patch
    return ImageAttention(*(shares.reshape(*shares.shape[:-1], *grid) for shares in (own, through_text)))


def _behind(array: np.ndarray, number: int) -> list[tuple[int, int]]:
    """So many more tokens, for `np.pad`."""
    return [(0, number if axis == 1 else 0) for axis in range(array.ndim)]


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
    of_patches = _rollout(seen.attentions)  # [B * I, P, P]
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
            taken = jnp.einsum("bts,bsip->btip", layer.mean(1).astype(jnp.float32), through_text)
            through_text = (through_text + taken) / 2
    return _shares(own), _shares(through_text)


def _rollout(layers: Sequence[Float[Array, "B N P P"]]) -> Float[Array, "B P P"]:
    """What each token of the tower's output has of each token that went in."""
    same = jnp.eye(layers[0].shape[-1])
    whole = same
    for layer in layers:
        whole = (layer.mean(1).astype(jnp.float32) + same) / 2 @ whole
    return whole


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
    return weights.mean(1).astype(jnp.float32)


def _shares(taken: Float[Array, "B T I P"]) -> Float[Array, "B T I P"]:
    whole = taken.sum((-2, -1), keepdims=True)
    return jnp.where(whole > 0, taken / jnp.where(whole > 0, whole, 1), 0)
