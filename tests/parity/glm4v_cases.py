"""The tiny GLM-4V whose arrays were written down by THUDM's own code, in ours; see tests/golden/README.md.

B rows   L ids   S slots   P = 16 patches of a picture
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_vlm import convert
from flax_vlm.convert import port
from flax_vlm.layers.param_tree import unflatten_params
from flax_vlm.models.glm4v import EVA2CLIPModel, GLM4VConfig, GLM4VForConditionalGeneration

GOLDEN = Path(__file__).parent.parent / "golden" / "glm4v"


@cache
def _planned() -> port.Plan:
    return port.open_checkpoint(GOLDEN)


def config() -> GLM4VConfig:
    return _planned().config


@cache
def oracle(dtype: str) -> dict[str, np.ndarray]:
    """The arrays; "float64" are those of the original computed in double throughout."""
    with np.load(GOLDEN / {"float64": "oracle_float64_pure.npz", "float32": "oracle_float32.npz"}[dtype]) as arrays:
        return dict(arrays)


def params(dtype: str) -> Any:
    """The golden weights, which are bfloat16 numbers, in `dtype`."""
    read = {each.flax: jnp.asarray(_planned().read(each).astype(np.float64), dtype) for each in _planned().sources}
    return unflatten_params(read)


def model(dtype: str = "float64", **options: Any) -> GLM4VForConditionalGeneration:
    return GLM4VForConditionalGeneration(config(), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), **options)


def inputs(case: str, dtype: str = "float64") -> dict[str, jax.Array]:
    """Those of the case "img", "pad" or "text": ids, mask, and pictures channels-last."""
    arrays = oracle("float64")
    given = {"input_ids": jnp.asarray(arrays[f"in.{case}.input_ids"], jnp.int32)}
    if case != "text":
        given["attention_mask"] = jnp.asarray(arrays[f"in.{case}.attention_mask"])
        given["images"] = jnp.asarray(arrays["in.images"].transpose(0, 2, 3, 1), dtype)
    return given


def torch_decoder(dtype: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' GlmForCausalLM of the golden sizes, with weights of the size that trained ones have."""
    import transformers

    return _trained(transformers.GlmForCausalLM(_glm_config(**changes)), dtype, seed)


def torch_whole(dtype: str, seed: int = 0) -> Any:
    """The same with pictures, which the golden tower sees."""
    import torch

    from tests.parity.glm4v_torch import GLM4V

    model = _trained(GLM4V(_glm_config(), config()), dtype, seed)
    state = convert.state_dict(config(), params("float32")["transformer"]["vision"], EVA2CLIPModel)
    model.vision.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return model


def _glm_config(**changes: Any) -> Any:
    import transformers

    sizes = config()
    return transformers.GlmConfig(
        **{
            "vocab_size": sizes.padded_vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.ffn_hidden_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": sizes.kv_channels,
            "rms_norm_eps": sizes.layernorm_epsilon,
            "max_position_embeddings": 2048,
            "pad_token_id": sizes.pad_token_id,
            "eos_token_id": list(sizes.eos_token_id),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "attn_implementation": "sdpa",
            **changes,
        }
    )


def _trained(model: Any, dtype: str, seed: int) -> Any:
    import torch

    model = model.eval().to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.copy_((1 + 0.2 * noise) if "norm" in key else 0.2 * noise)
    return model if dtype == "float32" else rounded_as_the_original(model)


def rounded_as_the_original(model: Any) -> Any:
    """`model`, with norms that round once, at their end, and nothing narrowed where it computes in double.

    transformers takes the variance and the angles in float32, whatever the dtype, and rounds a norm before it is
    scaled, which THUDM's code does not.
    """
    import torch
    from transformers.models.glm.modeling_glm import GlmRMSNorm, GlmRotaryEmbedding

    def rms_norm(self: Any, states: Any) -> Any:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normed).to(states.dtype)

    def rotary(self: Any, states: Any, position_ids: Any) -> Any:
        wide = torch.promote_types(states.dtype, torch.float32)
        exponents = torch.arange(0, 2 * len(self.inv_freq), 2, dtype=wide) / (2 * len(self.inv_freq))
        angles = position_ids[..., None].to(wide) * (1.0 / self.config.rope_parameters["rope_theta"] ** exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    for module in model.modules():
        for kind, forward in ((GlmRMSNorm, rms_norm), (GlmRotaryEmbedding, rotary)):
            if isinstance(module, kind):
                module.forward = forward.__get__(module)
    return model


def ported(model: Any, dtype: str | None = None) -> tuple[GLM4VConfig, Any]:
    """Config and parameters of one of these models, ours."""
    sizes = GLM4VConfig.from_hf(model.config.to_dict())
    if hasattr(model, "vision"):
        begin, end = config().picture_ids
        sizes = replace(sizes, vision_config=config().vision_config, boi_token_id=begin, eoi_token_id=end)
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    return sizes, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), in_our_places(sizes, model.state_dict()))


def in_our_places(config: GLM4VConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Weights, or their gradients, under the names of these models."""
    arrays = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    vision = {name.removeprefix("vision."): arrays.pop(name) for name in tensors if name.startswith("vision.")}
    params = convert.from_state_dict(replace(config, vision_config=None), arrays)
    if vision:
        params["transformer"]["vision"] = convert.from_state_dict(config, vision, EVA2CLIPModel)
    return params


@cache
def _applying(model: Any, flags: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(lambda params, arrays: model.apply({"params": params}, **arrays, **dict(flags)))


def forward(model: Any, params: Any, inputs: Mapping[str, Any], **flags: Any) -> Any:
    """`model.apply`, jitted once for all inputs of the same shapes."""
    return _applying(model, tuple(sorted(flags.items())))(params, dict(inputs))


@cache
def loss_and_gradients(model: Any) -> Any:
    """(params, inputs with labels) to ((loss, output), gradients), jitted once for all inputs of the same shapes."""

    def loss(params: Any, arrays: Any) -> Any:
        output = model.apply({"params": params}, **arrays, output_hidden_states=True)
        return output.loss, output

    return jax.jit(jax.value_and_grad(loss, has_aux=True))
