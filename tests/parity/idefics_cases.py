"""Tiny IDEFICS models, all of their sizes different, in transformers and in ours, on the same random weights.

B rows   T tokens   I images a row   P = 17 image tokens of the tower   L = 6 latents
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_vlm import convert
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.idefics import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsPerceiverConfig,
    IdeficsVisionConfig,
)

VISION = IdeficsVisionConfig(
    hidden_size=20,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=5,
    image_size=30,
    patch_size=7,
    layer_norm_eps=1e-4,
)
PERCEIVER = IdeficsPerceiverConfig(
    resampler_n_latents=6,
    resampler_depth=2,
    resampler_n_heads=3,
    resampler_head_dim=8,
    qk_layer_norms_perceiver=True,
)
# Between them: with and without resampler, norms on queries and keys, additional vocabulary and a tied head, both types
# of alpha, every interval from 1 to 3; and no epsilon, activation or theta that goes without saying.
RESAMPLED = IdeficsConfig(
    vocab_size=71,
    additional_vocab_size=5,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=3,
    alpha_type="vector",
    alpha_initializer="normal",
    alphas_initializer_range=0.7,
    qk_layer_norms=True,
    use_resampler=True,
    freeze_text_layers=False,
    freeze_vision_layers=False,
    max_position_embeddings=64,
    vision_config=VISION,
    perceiver_config=PERCEIVER,
)
PLAIN = replace(
    RESAMPLED,
    vision_config=replace(VISION, hidden_act="quick_gelu"),
    num_hidden_layers=4,
    cross_layer_interval=2,
    additional_vocab_size=0,
    alpha_type="float",
    alpha_initializer="ones",
    use_resampler=False,
    qk_layer_norms=False,
    hidden_act="gelu",
)
TIED = replace(
    RESAMPLED,
    num_hidden_layers=3,
    cross_layer_interval=3,
    alpha_type="float",
    alpha_initializer="zeros",
    tie_word_embeddings=True,
    rms_norm_eps=1e-4,
    rope_theta=500.0,
    perceiver_config=replace(PERCEIVER, qk_layer_norms_perceiver=False),
)
WHOLE = {"resampled": RESAMPLED, "plain": PLAIN, "tied": TIED}


def untouched_torch_model(config: IdeficsConfig, name: str = "IdeficsForVisionText2Text", seed: int = 0) -> Any:
    """The transformers model `name` as it initialises itself."""
    import torch
    import transformers
    from transformers.models.idefics import modeling_idefics

    transformers.logging.set_verbosity_error()
    # Alphas of one number each, drawn at random, are what transformers itself cannot make.
    alone = config.alpha_type == "float" and config.alpha_initializer not in ("zeros", "ones")
    hf_config = transformers.IdeficsConfig(**(replace(config, alpha_initializer="ones") if alone else config).to_hf())
    hf_config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    return getattr(modeling_idefics, name)(hf_config).eval()


def torch_model(
    config: IdeficsConfig, dtype: str, name: str = "IdeficsForVisionText2Text", seed: int = 0, alphas: bool = True
) -> Any:
    """The transformers model `name`, with weights of the size that trained ones have, biases and norms included.

    `alphas=False` leaves the gates as `config` initialises them.
    """
    import torch

    model = untouched_torch_model(config, name, seed).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            norm = "norm" in key or ".ln." in key
            if "alpha" in key:
                parameter.copy_(noise if alphas else parameter)
            else:
                parameter.copy_((1 + 0.2 * noise) if norm and key.endswith("weight") else 0.2 * noise)
    return model if dtype == "float32" else in_double(model)


def in_double(model: Any) -> Any:
    """`model`, with nothing narrowed where it computes in double.

    transformers takes the variance of an RMSNorm and the angles of rotary positions in float32, whatever the dtype.
    Under bfloat16 its frequencies would be rounded by `model.bfloat16()`, which loading a checkpoint in bfloat16 does
    not do. A model in float32 needs none of this: `torch_model` gives it as it is.
    """
    import torch
    from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm, IdeficsRotaryEmbedding

    def rms_norm(self: Any, states: Any) -> Any:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(self.weight.dtype)

    def rotary(self: Any, states: Any, position_ids: Any) -> Any:
        wide = torch.promote_types(states.dtype, torch.float32)
        exponents = torch.arange(0, 2 * len(self.inv_freq), 2, dtype=wide) / (2 * len(self.inv_freq))
        angles = position_ids[..., None].to(wide) * (1.0 / self.config.rope_parameters["rope_theta"] ** exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    for module in model.modules():
        for kind, forward in ((IdeficsRMSNorm, rms_norm), (IdeficsRotaryEmbedding, rotary)):
            if isinstance(module, kind):
                module.forward = forward.__get__(module)
    return model


def random_params(config: IdeficsConfig, dtype: str) -> Any:
    """Parameters of the whole model, of the size that trained ones have; without torch."""
    rng = np.random.default_rng(0)
    model = IdeficsForVisionText2Text(config)

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        noise = rng.standard_normal(shape)
        return jnp.asarray(
            1 + 0.2 * noise if path.endswith("scale") else noise if "alpha" in path else 0.2 * noise, dtype
        )

    shapes = flatten_params(nn.meta.unbox(abstract_params(model)))
    return unflatten_params({path: draw(path, leaf.shape) for path, leaf in shapes.items()})


def ported(config: IdeficsConfig, model: Any, model_class: Any = None) -> Any:
    """The parameters of a torch model, ours."""
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    return jax.tree.map(jnp.asarray, convert.from_state_dict(config, state, model_class))


stacked = jax.jit(stack_params)


@cache
def _applying(model: Any, flags: tuple[tuple[str, Any], ...], method: str | None) -> Any:
    return jax.jit(lambda params, arrays: model.apply({"params": params}, **arrays, **dict(flags), method=method))


def forward(model: Any, params: Any, inputs: Mapping[str, Any], method: str | None = None) -> Any:
    """`model.apply`, jitted once for all inputs of the same shapes, with booleans and integers compiled in."""
    flags = {name: value for name, value in inputs.items() if isinstance(value, bool | int)}
    arrays = {name: value for name, value in inputs.items() if name not in flags and value is not None}
    return _applying(model, tuple(sorted(flags.items())), method)(params, arrays)


def texts(length: int = 11, padding_side: str = "right", config: IdeficsConfig = RESAMPLED) -> dict[str, np.ndarray]:
    """Ids, additional ones among them, and mask of four ragged rows; row 0 is full."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, (4, length))
    if config.additional_vocab_size:
        ids[:, ::4] = config.vocab_size + rng.integers(0, config.additional_vocab_size, ids[:, ::4].shape)
    mask = np.ones_like(ids)
    for row in range(1, len(ids)):
        pad = min(2 * row, length - 1)
        where = slice(length - pad, None) if padding_side == "right" else slice(None, pad)
        ids[row, where], mask[row, where] = config.pad_token_id, 0
    return {"input_ids": ids, "attention_mask": mask}


IMAGES = (3, 1, 0, 2)  # in each of the four rows


def images(length: int = 11, height: int = 30, width: int = 30) -> dict[str, np.ndarray]:
    """Channels-last pictures, absent ones zero, and the mask by which a token looks at the latest image before it."""
    rng = np.random.default_rng(1)
    pictures = rng.standard_normal((len(IMAGES), max(IMAGES), height, width, 3))
    mask = np.zeros((len(IMAGES), length, max(IMAGES)), int)
    for row, count in enumerate(IMAGES):
        pictures[row, count:] = 0
        starts = np.sort(rng.permutation(length - 2)[:count])
        for image, start in enumerate(starts):
            mask[row, start:] = 0
            mask[row, start:, image] = 1
    return {"pixel_values": pictures, "image_attention_mask": mask}


def embedded_images(config: IdeficsConfig, length: int = 11) -> dict[str, np.ndarray]:
    """What comes out of the resampler, or of the tower where there is none, and the mask of `images`."""
    name, tokens = ("perceiver_embeddings", 6) if config.use_resampler else ("image_encoder_embeddings", 17)
    shape = (len(IMAGES), max(IMAGES), tokens, config.vision_config.embed_dim)
    mask = images(length)["image_attention_mask"]
    return {name: np.random.default_rng(3).standard_normal(shape), "image_attention_mask": mask}


def inputs(length: int = 11, padding_side: str = "right", config: IdeficsConfig = RESAMPLED) -> dict[str, np.ndarray]:
    """A batch of mixed rows: three images, one, none, two."""
    return texts(length, padding_side, config) | images(length)


def labels(inputs: Mapping[str, np.ndarray], config: IdeficsConfig = RESAMPLED) -> np.ndarray:
    """The ids, those of two positions ignored. On padding they name a token, which the loss must not count."""
    labels = np.where(inputs["attention_mask"] == 0, config.vocab_size - 1, inputs["input_ids"])
    labels[0, 3] = labels[-1, -1] = -100
    return labels


def legacy_loss(logits: Any, labels: Any, attention_mask: Any) -> Any:
    """The loss of transformers up to 4.51: padding never counts, and neither does a label of -100."""
    import torch

    counts = attention_mask[:, 1:] != 0
    return torch.nn.functional.cross_entropy(logits[:, :-1][counts], labels[:, 1:][counts])


def to_torch(inputs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same inputs as tensors; pictures channels-first."""
    import torch

    def convert_one(name: str, value: Any) -> Any:
        if isinstance(value, bool | int):
            return value
        tensor = torch.tensor(np.asarray(value))
        if name == "pixel_values":
            tensor = tensor.movedim(-1, -3)
        return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor

    return {name: convert_one(name, value) for name, value in inputs.items()}


def to_jax(inputs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same inputs as jax arrays."""

    def convert_one(value: Any) -> Any:
        if isinstance(value, bool | int):
            return value
        return jnp.asarray(value, dtype if np.issubdtype(np.asarray(value).dtype, np.floating) else None)

    return {name: convert_one(value) for name, value in inputs.items()}


@cache
def loss_and_gradients(model: Any) -> Any:
    """(params, inputs with labels) to ((loss, output), gradients), jitted once for all inputs of the same shapes."""

    def loss(params: Any, arrays: Any) -> Any:
        output = model.apply({"params": params}, **arrays, output_hidden_states=True)
        return output.loss, output

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def torch_loss_and_gradients(model: Any, inputs: Mapping[str, Any], dtype: str) -> tuple[Any, Any, dict[str, Any]]:
    """(loss, output, gradients) of transformers, with the loss of the releases up to 4.51."""
    tensors = to_torch(inputs, dtype)
    labels = tensors.pop("labels")
    output = model(**tensors, output_hidden_states=True)
    loss = legacy_loss(output.logits, labels, tensors["attention_mask"])
    model.zero_grad()
    loss.backward()
    gradients = {name: each.grad if each.grad is not None else 0 * each for name, each in model.named_parameters()}
    return loss.detach(), output, {name: each.detach().numpy() for name, each in gradients.items()}
