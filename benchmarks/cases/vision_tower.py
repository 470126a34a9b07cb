"""AltCLIP's image tower, ViT-L/14 at its real size with random weights: pictures to token states and a pooled state."""

from functools import partial
from typing import Any

import numpy as np

from benchmarks.cases import Case, Work

VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
SMALL = VIT_L_14 | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}


def cases(quick: bool) -> list[Case]:
    """Batch 1 and 8, float32 and bfloat16; weights are held in the dtype that computes."""
    sizes = SMALL if quick else VIT_L_14
    chosen = []
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8):
            contestants = {
                "flax_vlm": partial(ours, sizes, batch, dtype),
                "torch sdpa": partial(theirs, sizes, batch, dtype),
            }
            if not quick:  # it takes 20 s and a C++ compiler for any size
                contestants["torch.compile"] = partial(theirs, sizes, batch, dtype, compiled=True)
            chosen.append(Case(f"AltCLIP image tower ViT-L/14, batch {batch}, {dtype}", contestants))
    return chosen


def pictures(sizes: dict[str, Any], batch: int) -> np.ndarray:
    """Channels-last."""
    shape = (batch, sizes["image_size"], sizes["image_size"], 3)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def ours(sizes: dict[str, Any], batch: int, dtype: str) -> Work:
    """`AltCLIPVisionModel`, jitted, its layers unrolled."""
    import jax
    import jax.numpy as jnp
    from flax.linen import meta

    from flax_vlm.models.altclip import AltCLIPVisionConfig, AltCLIPVisionModel

    model = AltCLIPVisionModel(AltCLIPVisionConfig(**sizes), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    pixel_values = jnp.asarray(pictures(sizes, batch), dtype)
    params = jax.jit(lambda key: meta.unbox(model.init(key, pixel_values))["params"])(jax.random.key(0))
    jax.block_until_ready((params, pixel_values))
    forward = jax.jit(lambda params, pixel_values: model.apply({"params": params}, pixel_values))
    return Work(
        run=lambda: jax.block_until_ready(forward(params, pixel_values)),
        as_numpy=lambda output: np.asarray(output.last_hidden_state, np.float32),
    )


def theirs(sizes: dict[str, Any], batch: int, dtype: str, compiled: bool = False) -> Work:
    """transformers' `AltCLIPVisionModel` with torch's own attention kernel, plain or under `torch.compile`."""
    import torch
    from transformers import AltCLIPVisionConfig, AltCLIPVisionModel

    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    model = AltCLIPVisionModel._from_config(
        AltCLIPVisionConfig(**sizes), attn_implementation="sdpa", dtype=torch_dtype
    ).eval()
    pixel_values = torch.from_numpy(pictures(sizes, batch)).permute(0, 3, 1, 2).contiguous().to(torch_dtype)
    forward = torch.compile(model) if compiled else model

    def run() -> Any:
        with torch.inference_mode():
            return forward(pixel_values=pixel_values)

    return Work(run=run, as_numpy=lambda output: output.last_hidden_state.float().numpy())
