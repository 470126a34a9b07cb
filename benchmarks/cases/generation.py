"""IDEFICS with 630 million random weights: reading 256 tokens and one image, and writing 64 tokens greedily.

The time of the decoding alone is that of `64 new` less that of `1 new`. Its bound on memory is what reading all weights
takes once a token: `benchmarks` measures that too, as the sum of an array of their size.
"""

from functools import partial
from typing import Any

import numpy as np

from benchmarks.cases import Case, Work

IDEFICS_630M = {
    "vocab_size": 32000,
    "additional_vocab_size": 2,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "cross_layer_interval": 4,
    "alpha_initializer": "ones",  # zeros would hide the image
    "qk_layer_norms": True,
    # The image comes as 257 tokens of the tower, which itself is not measured here.
    "vision_config": {"embed_dim": 1280, "num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 64},
}
SMALL = IDEFICS_630M | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vision_config": {"embed_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
}
PROMPT, IMAGE_TOKENS = 256, 257


def cases(quick: bool) -> list[Case]:
    """Batch 1 and 8, float32 and bfloat16."""
    sizes = SMALL if quick else IDEFICS_630M
    chosen = [
        Case(
            f"sum of 2.5 GB of {dtype}: memory bandwidth",
            {"flax_vlm": partial(our_sum, count, dtype), "torch sdpa": partial(their_sum, count, dtype)},
        )
        for dtype, count in (("float32", 10**6 if quick else 630 * 10**6),)
    ]
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8):
            for new in (1, 64):
                tokens = min(new, 8) if quick else new
                contestants = {
                    "flax_vlm": partial(ours, sizes, batch, dtype, tokens),
                    "torch sdpa": partial(theirs, sizes, batch, dtype, tokens),
                }
                chosen.append(Case(f"IDEFICS 630M, {PROMPT} tokens and {new} new, batch {batch}, {dtype}", contestants))
    return chosen


def inputs(sizes: dict[str, Any], batch: int) -> dict[str, np.ndarray]:
    """One image to look at from the middle of the prompt on."""
    rng = np.random.default_rng(0)
    image_mask = np.zeros((batch, PROMPT, 1), np.int32)
    image_mask[:, PROMPT // 2 :] = 1
    shape = (batch, 1, IMAGE_TOKENS, sizes["vision_config"]["embed_dim"])
    return {
        "input_ids": rng.integers(3, sizes["vocab_size"], (batch, PROMPT)).astype(np.int32),
        "attention_mask": np.ones((batch, PROMPT), np.int32),
        "image_encoder_embeddings": rng.standard_normal(shape, np.float32),
        "image_attention_mask": image_mask,
    }


def ours(sizes: dict[str, Any], batch: int, dtype: str, new: int) -> Work:
    """`generation.generate`, layers unrolled."""
    import jax
    import jax.numpy as jnp
    from flax.linen import meta

    from flax_vlm import generation
    from flax_vlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text

    compute = jnp.dtype(dtype)
    model = IdeficsForVisionText2Text(IdeficsConfig.from_hf(sizes), dtype=compute, param_dtype=compute)
    example: dict[str, Any] = model.example_inputs()
    params = jax.jit(lambda key: meta.unbox(model.init(key, **example))["params"])(jax.random.key(0))
    config = generation.GenerationConfig(max_new_tokens=new, min_new_tokens=new, eos_token_id=2, pad_token_id=0)
    prompt = inputs(sizes, batch)
    jax.block_until_ready(params)
    return Work(
        run=lambda: generation.generate(model, params, prompt, config),
        as_numpy=lambda output: np.asarray(output.sequences, np.float32),
    )


def theirs(sizes: dict[str, Any], batch: int, dtype: str, new: int) -> Work:
    """transformers' `generate` with torch's own attention kernel."""
    import torch
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    config = IdeficsConfig(**sizes)
    model: Any = IdeficsForVisionText2Text._from_config(config, attn_implementation="sdpa", dtype=torch_dtype).eval()
    prompt: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs(sizes, batch).items()}
    prompt["input_ids"] = prompt["input_ids"].long()
    prompt["image_encoder_embeddings"] = prompt["image_encoder_embeddings"].to(torch_dtype)

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    return Work(run=run, as_numpy=lambda output: output.float().numpy())


def our_sum(count: int, dtype: str) -> Work:
    import jax
    import jax.numpy as jnp

    array = jnp.ones(count, dtype)
    total = jax.jit(lambda array: array.reshape(8, -1).sum(-1))
    return Work(run=lambda: jax.block_until_ready(total(array)), as_numpy=np.asarray)


def their_sum(count: int, dtype: str) -> Work:
    import torch

    array = torch.ones(count, dtype=getattr(torch, dtype))
    return Work(run=lambda: array.reshape(8, -1).sum(-1), as_numpy=lambda output: output.float().numpy())
