"""Reading 256 tokens and writing 64 greedily, with random weights: IDEFICS of 630 million, which looks at an image, and
four of the 40 layers of GLM-4V's decoder at their real width, with a smaller vocabulary, 1.1 billion.

The time of the decoding alone is that of `64 new` less that of `1 new`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks import device
from benchmarks.cases import Case, Phase, Work

Sizes = dict[str, Any]

IDEFICS_630M: Sizes = {
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
IDEFICS_SMALL = IDEFICS_630M | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vision_config": {"embed_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
}
GLM_1B: Sizes = {  # the names of transformers' `glm`
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLM_SMALL = GLM_1B | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}
PROMPT, IMAGE_TOKENS = 256, 257


class Family(NamedTuple):
    """What is written with: its model here and in transformers, and what it reads."""

    sizes: Sizes
    small: Sizes
    batches: tuple[int, ...]
    our_model: Callable[..., Any]  # of sizes and dtypes
    their_model: Callable[[Sizes], tuple[Any, Any]]  # a config and its class
    inputs: Callable[[Sizes, int], dict[str, np.ndarray]]  # of sizes and a batch


def cases(quick: bool) -> list[Case]:
    """float32 and bfloat16; batch 1, and 8 of IDEFICS."""
    chosen = []
    for name, family in FAMILIES.items():
        sizes = family.small if quick else family.sizes
        for dtype in ("float32", "bfloat16"):
            for batch in family.batches:
                for new in (1, 64):
                    tokens = min(new, 8) if quick else new
                    contestants = {
                        "flax_vlm": partial(ours, family, sizes, batch, dtype, tokens),
                        "torch sdpa": partial(theirs, family, sizes, batch, dtype, tokens),
                    }
                    if dtype == "bfloat16":
                        contestants["flax_vlm, int8"] = partial(
                            ours, family, sizes, batch, dtype, tokens, quantize=True
                        )
                    chosen.append(Case(f"{name}, {PROMPT} tokens and {new} new, batch {batch}, {dtype}", contestants))
    return chosen


def ours(family: Family, sizes: Sizes, batch: int, dtype: str, new: int, quantize: bool = False) -> Work:
    """`generation.generate`, layers unrolled; with `quantize` as `from_pretrained(quantize="int8")` has it."""
    import jax
    import jax.numpy as jnp
    from flax.linen import meta

    from flax_vlm import generation
    from flax_vlm.layers.quantized import quantize_params

    compute = jnp.dtype(dtype)
    model = family.our_model(sizes, dtype=compute, param_dtype=compute)
    example: dict[str, Any] = model.example_inputs()
    params = jax.jit(lambda key: meta.unbox(model.init(key, **example))["params"])(jax.random.key(0))
    config = generation.GenerationConfig(max_new_tokens=new, min_new_tokens=new, eos_token_id=2, pad_token_id=0)
    prompt = family.inputs(sizes, batch)
    if quantize:
        params = quantize_params(params)
    jax.block_until_ready(params)
    return Work(
        run=lambda: generation.generate(model, params, prompt, config),
        as_numpy=lambda output: np.asarray(output.sequences, np.float32),
        phases=phases(params, sizes, batch, new),
        dtype=dtype,
    )


def phases(params: Any, sizes: Sizes, batch: int, new: int) -> tuple[Phase, ...]:
    """Reading, then writing: two operations a weight and a row, of the head where a word is chosen; all weights once.

    The table of words is looked up: it is neither multiplied nor read whole. What attention takes is left out.
    """
    import jax

    words = sizes["vocab_size"] * sizes["hidden_size"]
    leaves = jax.tree.leaves(params)
    count, nbytes = (sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves))
    multiplied, held = count - words, nbytes * (1 - words / count)
    read = Phase(2 * batch * (PROMPT * (multiplied - words) + words), held)
    return (read, Phase(2 * batch * multiplied, held, new - 1))


def theirs(family: Family, sizes: Sizes, batch: int, dtype: str, new: int) -> Work:
    """transformers' `generate` with torch's own attention kernel."""
    import torch

    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    config, model_class = family.their_model(sizes)
    model: Any = model_class._from_config(config, attn_implementation="sdpa", dtype=torch_dtype).eval()
    model.to(device.of_torch())
    arrays = {name: torch.from_numpy(array) for name, array in family.inputs(sizes, batch).items()}
    prompt: dict[str, Any] = {name: array.to(device.of_torch()) for name, array in arrays.items()}
    prompt = {name: each.to(torch_dtype) if each.is_floating_point() else each.long() for name, each in prompt.items()}

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    return device.torch_work(run)


def our_idefics(sizes: Sizes, **dtypes: Any) -> Any:
    from flax_vlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text

    return IdeficsForVisionText2Text(IdeficsConfig.from_hf(sizes), **dtypes)


def their_idefics(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    return IdeficsConfig(**sizes), IdeficsForVisionText2Text


def our_glm(sizes: Sizes, **dtypes: Any) -> Any:
    from flax_vlm.models.glm4v import GLM4VConfig, GLM4VForCausalLM

    return GLM4VForCausalLM(GLM4VConfig.from_hf({"model_type": "glm", **sizes}), **dtypes)


def their_glm(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import GlmConfig, GlmForCausalLM

    return GlmConfig(**sizes), GlmForCausalLM


def words(sizes: Sizes, batch: int) -> dict[str, np.ndarray]:
    """Words without padding."""
    return {
        "input_ids": np.random.default_rng(0).integers(3, sizes["vocab_size"], (batch, PROMPT)).astype(np.int32),
        "attention_mask": np.ones((batch, PROMPT), np.int32),
    }


def words_and_image(sizes: Sizes, batch: int) -> dict[str, np.ndarray]:
    """One image to look at from the middle of the words on."""
    image_mask = np.zeros((batch, PROMPT, 1), np.int32)
    image_mask[:, PROMPT // 2 :] = 1
    shape = (batch, 1, IMAGE_TOKENS, sizes["vision_config"]["embed_dim"])
    return {
        **words(sizes, batch),
        "image_encoder_embeddings": np.random.default_rng(1).standard_normal(shape, np.float32),
        "image_attention_mask": image_mask,
    }


FAMILIES = {
    "IDEFICS 630M": Family(IDEFICS_630M, IDEFICS_SMALL, (1, 8), our_idefics, their_idefics, words_and_image),
    "GLM-4V decoder 1.1B": Family(GLM_1B, GLM_SMALL, (1,), our_glm, their_glm, words),
}
