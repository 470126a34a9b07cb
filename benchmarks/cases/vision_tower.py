"""Image towers with random weights: AltCLIP's at its real size, GLM-4V's at its real width and with its adapter.

AltCLIP's is a ViT-L/14, pictures to token states and a pooled state. Of GLM-4V's EVA2-CLIP there are 4 of 63 layers,
all alike, and what comes out is what takes the picture's place among the words.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import device
from benchmarks.cases import Case, Phase, Work

Sizes = dict[str, Any]

VIT_L_14: Sizes = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
VIT_SMALL = VIT_L_14 | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
EVA2: Sizes = {"vision_config": {"num_hidden_layers": 4}}  # the defaults are those of glm-4v-9b
EVA2_SMALL: Sizes = {
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "image_size": 56,
        "num_positions": 17,
    },
}


def cases(quick: bool) -> list[Case]:
    """Batch 1, and 8 of AltCLIP; float32 and bfloat16. Weights are held in the dtype that computes."""
    chosen = []
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8):
            sizes = VIT_SMALL if quick else VIT_L_14
            contestants = {
                "flax_vlm": partial(our_altclip, sizes, batch, dtype),
                "torch sdpa": partial(their_altclip, sizes, batch, dtype),
            }
            if not quick:  # it takes 20 s and a C++ compiler for any size
                contestants["torch.compile"] = partial(their_altclip, sizes, batch, dtype, compiled=True)
            chosen.append(Case(f"AltCLIP image tower ViT-L/14, batch {batch}, {dtype}", contestants))
    for dtype in ("float32", "bfloat16"):
        sizes = EVA2_SMALL if quick else EVA2
        contestants = {"flax_vlm": partial(our_eva2, sizes, dtype), "torch sdpa": partial(their_eva2, sizes, dtype)}
        chosen.append(Case(f"GLM-4V image tower EVA2-CLIP, 4 layers and adapter, batch 1, {dtype}", contestants))
    return chosen


def our_altclip(sizes: Sizes, batch: int, dtype: str) -> Work:
    """`AltCLIPVisionModel`."""
    from flax_vlm.models.altclip import AltCLIPVisionConfig, AltCLIPVisionModel

    make = partial(AltCLIPVisionModel, AltCLIPVisionConfig(**sizes))
    return ours(make, pictures(sizes["image_size"], batch), dtype, lambda output: output.last_hidden_state)


def their_altclip(sizes: Sizes, batch: int, dtype: str, compiled: bool = False) -> Work:
    """transformers' `AltCLIPVisionModel` with torch's own attention kernel, plain or under `torch.compile`."""
    import torch
    from transformers import AltCLIPVisionConfig, AltCLIPVisionModel

    torch.manual_seed(0)
    model = AltCLIPVisionModel._from_config(
        AltCLIPVisionConfig(**sizes), attn_implementation="sdpa", dtype=getattr(torch, dtype)
    )
    images = pictures(sizes["image_size"], batch)
    return theirs(model, images, dtype, lambda output: output.last_hidden_state, compiled)


def our_eva2(sizes: Sizes, dtype: str) -> Work:
    """`EVA2CLIPModel`."""
    from flax_vlm.models.glm4v import EVA2CLIPModel

    config = eva2_config(sizes)
    return ours(partial(EVA2CLIPModel, config), pictures(config.vision_config.image_size, 1), dtype, lambda out: out)


def their_eva2(sizes: Sizes, dtype: str) -> Work:
    """The original in torch's own modules and attention kernel, as the parity tests hold it to THUDM's arrays."""
    import torch

    from tests.parity.glm4v_torch import EVA2CLIPModel

    torch.manual_seed(0)
    config = eva2_config(sizes)
    model = EVA2CLIPModel(config).to(getattr(torch, dtype))
    return theirs(model, pictures(config.vision_config.image_size, 1), dtype, lambda output: output)


def eva2_config(sizes: Sizes) -> Any:
    from flax_vlm.models.glm4v import GLM4VConfig

    return GLM4VConfig.from_hf({"boi_token_id": 1, "eoi_token_id": 2, **sizes})


def pictures(size: int, batch: int) -> np.ndarray:
    """Channels-last."""
    return np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)


def ours(make: Callable[..., Any], images: np.ndarray, dtype: str, states: Callable[[Any], Any]) -> Work:
    """A tower that `make` makes of dtypes, jitted, its layers unrolled; `states` are those of an output to compare."""
    import jax
    import jax.numpy as jnp
    from flax.linen import meta

    from flax_vlm.training.metrics import count_flops

    model = make(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    pixels = jnp.asarray(images, dtype)
    params = jax.jit(lambda key: meta.unbox(model.init(key, pixels))["params"])(jax.random.key(0))
    jax.block_until_ready((params, pixels))
    forward = jax.jit(lambda params, pixels: model.apply({"params": params}, pixels))
    flops = count_flops(jax.make_jaxpr(forward)(params, pixels))
    return Work(
        run=lambda: jax.block_until_ready(forward(params, pixels)),
        as_numpy=lambda output: np.asarray(states(output), np.float32),
        phases=(Phase(flops, sum(leaf.nbytes for leaf in jax.tree.leaves(params))),),
        dtype=dtype,
    )


def theirs(model: Any, images: np.ndarray, dtype: str, states: Callable[[Any], Any], compiled: bool = False) -> Work:
    """A module of torch, plain or under `torch.compile`."""
    import torch

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device.of_torch(), getattr(torch, dtype))
    model = model.to(device.of_torch()).eval()
    forward = device.compile_torch(model) if compiled else model

    def run() -> Any:
        with torch.inference_mode():
            return forward(pixels)

    return device.torch_work(run, states)
