"""What a word was read from: shares that can be worked out by hand, in loop and scan."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import IdeficsConfig, IdeficsForVisionText2Text, IdeficsPerceiverConfig, IdeficsVisionConfig
from flax_vlm.layers.kept_weights import KEPT
from flax_vlm.layers.perceiver import PerceiverResampler
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.idefics.image_attention import _resampled, image_attention
from flax_vlm.models.rollout import rollout

# One token without a picture, two that see the first of two, one that sees the second.
SEES = np.array([[[0, 0], [1, 0], [1, 0], [0, 1]]])


def make_model(layers: int = 1, interval: int = 1, resampler: bool = True) -> Any:
    vision = IdeficsVisionConfig(
        hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3, image_size=8, patch_size=4
    )
    return IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=2,
            cross_layer_interval=interval,
            use_resampler=resampler,
            qk_layer_norms=False,
            vision_config=vision,
            perceiver_config=IdeficsPerceiverConfig(
                resampler_n_latents=3, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=4
            ),
        )
    )


def make_params(model: Any, indifferent: bool = False) -> Any:
    """Random parameters; or without queries, so that everything attends all it may alike."""
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())["params"])

    def fill(path: Any, leaf: Any) -> np.ndarray:
        names = [key.key for key in path]
        queries = indifferent and "q_proj" in names
        return (np.zeros if queries else rng.standard_normal)(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def make_inputs(batch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "input_ids": np.repeat(np.array([[1, 2, 3, 4]]), batch, 0),
        "pixel_values": rng.standard_normal((batch, 2, 8, 8, 3)).astype(np.float32),
        "image_attention_mask": np.repeat(SEES, batch, 0),
    }


@pytest.mark.parametrize("resampler", [True, False])
def test_indifferent_attention_gives_the_shares_that_it_must(resampler: bool) -> None:
    model = make_model(resampler=resampler)
    own, through_text = image_attention(model, make_params(model, indifferent=True), make_inputs())
    assert own.shape == (1, 4, 2, 2, 2)
    looked = np.array([[0, 0], [1, 0], [1, 0], [0, 1]])  # where each token looks; alike over the four patches
    np.testing.assert_allclose(own, np.broadcast_to(looked[None, ..., None, None] / 4, own.shape), atol=1e-6)
    # A token keeps half, and takes the other half from all tokens up to itself.
    read = np.array([[0, 0], [1 / 2, 0], [2 / 3, 0], [2 / 4, 1 / 4]])
    expected = looked / 2 + read / 2
    expected /= np.maximum(expected.sum(-1, keepdims=True), 1e-9)
    np.testing.assert_allclose(through_text.sum((-2, -1))[0], expected, atol=1e-6)
    np.testing.assert_allclose(through_text[0, 3, 0], np.full((2, 2), expected[3, 0] / 4), atol=1e-6)


def test_it_goes_where_attention_goes() -> None:
    """A latent that attends one patch alone, and a tower whose tokens keep to themselves, point at that patch."""
    config = make_model().config
    of_one = np.zeros((1, 2, 3, 5 + 3), np.float32)
    of_one[..., 2] = 0.25  # the picture's token 2, for a quarter; the latents for the rest
    of_one[..., 5:] = 0.25
    kept = {f"blocks_{block}": {"attn": {"weights": (jnp.asarray(of_one),)}} for block in range(2)}
    np.testing.assert_allclose(_resampled(kept, config)[0], np.eye(5)[[2] * 3], atol=1e-6)
    to_themselves = jnp.broadcast_to(jnp.eye(5), (1, 2, 5, 5))
    np.testing.assert_allclose(rollout([to_themselves] * 3), np.eye(5)[None], atol=1e-6)
    to_the_first = jnp.zeros((1, 2, 5, 5)).at[..., 0].set(1)
    np.testing.assert_allclose(rollout([to_themselves, to_the_first])[0, 3], [0.5, 0, 0, 0.5, 0], atol=1e-6)


def test_loop_and_scan_agree() -> None:
    model = make_model(layers=2)
    params, inputs = make_params(model), make_inputs(2)
    scanned = model.clone(scan_layers=True)
    for ours, theirs in zip(
        image_attention(model, params, inputs), image_attention(scanned, stack_params(params), inputs), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(ours.sum((-3, -2, -1)), [[0, 1, 1, 1]] * 2, atol=1e-5)


def test_layers_keep_weights_for_whoever_asks_and_give_the_same() -> None:
    resampler = PerceiverResampler(embed_dim=8, depth=2, num_heads=2, head_dim=4, num_latents=3, qk_layer_norms=True)
    context = jax.random.normal(jax.random.key(0), (2, 5, 8))
    variables = jax.jit(resampler.init)(jax.random.key(1), context)
    assert KEPT not in variables
    output, kept = jax.jit(partial(resampler.apply, mutable=[KEPT]))(variables, context)
    np.testing.assert_allclose(output, jax.jit(resampler.apply)(variables, context), atol=1e-6)
    weights = [kept[KEPT][f"blocks_{block}"]["attn"]["weights"][0] for block in range(2)]
    assert {array.shape for array in weights} == {(2, 2, 3, 5 + 3)}
    np.testing.assert_allclose([array.sum(-1) for array in weights], 1.0, atol=1e-6)


def test_answers_see_what_the_prompt_ended_with() -> None:
    model = make_model()
    params, inputs = make_params(model), make_inputs()
    longer = np.array([[1, 2, 3, 4, 5, 6]])
    own, _ = image_attention(model, params, inputs, longer)
    assert own.shape[1] == 6
    np.testing.assert_allclose(own[:, :4], image_attention(model, params, inputs).own, atol=1e-5)
    np.testing.assert_allclose(own[0, 4:].sum((-2, -1)), [[0, 1]] * 2, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected the prompts \(1, 4\) with their answers behind"):
        image_attention(model, params, inputs, longer[:, ::-1])
    with pytest.raises(ValueError, match="pixel_values missing"):
        image_attention(model, params, {"input_ids": longer, "image_attention_mask": SEES})
