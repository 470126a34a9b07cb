"""Tiny AltCLIP models, all of their sizes different, in transformers and in ours, on the same random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_vlm import convert
from flax_vlm.models.altclip import AltCLIPConfig, AltCLIPTextConfig, AltCLIPVisionConfig

TEXT = AltCLIPTextConfig(
    vocab_size=71,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=40,
    type_vocab_size=2,
    project_dim=14,
)
VISION = AltCLIPVisionConfig(
    hidden_size=20,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=5,
    image_size=30,
    patch_size=7,
)
WHOLE = AltCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=11)


def untouched_torch_model(config: Any, name: str, seed: int = 0) -> Any:
    """The transformers model `name` as it initialises itself."""
    import torch
    import transformers
    from transformers.models.altclip import modeling_altclip

    transformers.logging.set_verbosity_error()
    hf_name = {"AltRobertaModel": "AltCLIPTextConfig"}.get(name, name.replace("Model", "Config"))
    hf_config = getattr(transformers, hf_name)(**config.to_hf())
    hf_config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    return getattr(modeling_altclip, name)(hf_config).eval()


def torch_model(config: Any, name: str, dtype: str, seed: int = 0) -> Any:
    """The transformers model `name`, with weights of the size that trained ones have, biases and norms included."""
    import torch

    model = untouched_torch_model(config, name, seed).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key == "logit_scale":
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            norm = "norm" in key.lower() or "pre_LN" in key
            parameter.copy_((1 + 0.2 * noise) if norm and key.endswith("weight") else 0.2 * noise)
    return model


def ported(config: Any, model: Any, model_class: Any) -> Any:
    """The parameters of a torch model, ours."""
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    return jax.tree.map(jnp.asarray, convert.from_state_dict(config, state, model_class))


def forward(model: Any, params: Any, inputs: dict[str, Any], method: str | None = None) -> Any:
    """`model.apply`, jitted, with booleans compiled in."""
    flags = {name: value for name, value in inputs.items() if isinstance(value, bool)}
    arrays = {name: value for name, value in inputs.items() if name not in flags}
    return jax.jit(lambda p, a: model.apply({"params": p}, **a, **flags, method=method))(params, arrays)


def texts(rows: int = 3, length: int = 9, padding_side: str = "right", seed: int = 0) -> dict[str, np.ndarray]:
    """Ids and mask of ragged rows; row 0 is full, others shorter."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, TEXT.vocab_size, (rows, length))
    mask = np.ones_like(ids)
    for row in range(1, rows):
        pad = min(2 * row, length - 1)
        where = slice(length - pad, None) if padding_side == "right" else slice(None, pad)
        ids[row, where], mask[row, where] = TEXT.pad_token_id, 0
    types = rng.integers(0, TEXT.type_vocab_size, ids.shape)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def images(count: int = 3, height: int = 30, width: int = 30, seed: int = 1) -> np.ndarray:
    """Channels-last pictures."""
    return np.random.default_rng(seed).standard_normal((count, height, width, 3))


def to_torch(inputs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same inputs as tensors; pictures channels-first."""
    import torch

    def convert_one(name: str, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        tensor = torch.tensor(np.asarray(value))
        if name == "pixel_values":
            tensor = tensor.permute(0, 3, 1, 2)
        return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor

    return {name: convert_one(name, value) for name, value in inputs.items()}


def to_jax(inputs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same inputs as jax arrays."""

    def convert_one(value: Any) -> Any:
        if isinstance(value, bool):
            return value
        return jnp.asarray(value, dtype if np.issubdtype(np.asarray(value).dtype, np.floating) else None)

    return {name: convert_one(value) for name, value in inputs.items()}
