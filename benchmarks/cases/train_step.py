"""A training step with random weights: forward, backward and AdamW, with float32 master weights.

An image tower of 87 million parameters (ViT-B/16), and two of the layers of the IDEFICS that `generation` writes with,
288 million with the vocabulary, whose weights, gradients and slots take 4.6 GB on either side. In bfloat16 torch runs
under its autocast. `flax-vlm train` starts with large pages of memory, and so do both here. Our layers are unrolled, as
torch's are; a scan of them compiles faster and runs slower on a CPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import device
from benchmarks.cases import Case, Phase, Work
from benchmarks.cases.generation import IDEFICS_630M, IDEFICS_SMALL, PROMPT, words_and_image
from benchmarks.cases.vision_tower import VIT_SMALL, pictures
from flax_vlm.cli import large_pages

Sizes = dict[str, Any]

VIT_B_16: Sizes = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
}
VIT_BATCH = 8
IDEFICS = IDEFICS_630M | {
    "num_hidden_layers": 2,
    "cross_layer_interval": 2,
    "freeze_text_layers": False,  # transformers freezes them unless told
    "freeze_vision_layers": False,
}
RATE = 1e-5
TURN = 15  # seconds: steps follow each other, as in training, where one takes up the memory that the last gave back


def cases(quick: bool) -> list[Case]:
    """float32 and bfloat16."""
    vit, idefics = (VIT_SMALL, IDEFICS_SMALL) if quick else (VIT_B_16, IDEFICS)
    chosen = []
    for dtype in ("float32", "bfloat16"):
        for title, ours, theirs, sizes in (
            (f"ViT-B/16, batch {VIT_BATCH}", our_vit, their_vit, vit),
            (f"IDEFICS 288M, {PROMPT} tokens, batch 1", our_idefics, their_idefics, idefics),
        ):
            contestants = {"flax_vlm": partial(ours, sizes, dtype), "torch sdpa": partial(theirs, sizes, dtype)}
            environments = dict.fromkeys(contestants, large_pages.environment())
            chosen.append(Case(f"train step, {title}, {dtype}", contestants, environments, TURN))
    return chosen


def our_vit(sizes: Sizes, dtype: str) -> Work:
    """`AltCLIPVisionModel`; what is minimised is the mean square of its pooled state."""
    import jax.numpy as jnp

    from flax_vlm.models.altclip import AltCLIPVisionConfig, AltCLIPVisionModel
    from flax_vlm.training.objective import Loss

    model = AltCLIPVisionModel(
        AltCLIPVisionConfig(**sizes), dtype=jnp.dtype(dtype), param_dtype=jnp.float32, scan_layers=False
    )

    def objective(params: Any, batch: Any, rng: Any) -> Loss:
        output: Any = model.apply({"params": params}, **batch)
        pooled = output.pooler_output.astype(jnp.float32)
        return Loss(jnp.square(pooled).sum(), jnp.float32(pooled.size))

    return ours(model, objective, {"pixel_values": pictures(sizes["image_size"], VIT_BATCH)})


def their_vit(sizes: Sizes, dtype: str) -> Work:
    import torch
    from transformers import AltCLIPVisionConfig, AltCLIPVisionModel

    torch.manual_seed(0)
    model = AltCLIPVisionModel._from_config(AltCLIPVisionConfig(**sizes), attn_implementation="sdpa")
    images = pictures(sizes["image_size"], VIT_BATCH).transpose(0, 3, 1, 2).copy()
    return theirs(model, {"pixel_values": images}, dtype, lambda output: output.pooler_output.float().square().mean())


def our_idefics(sizes: Sizes, dtype: str) -> Work:
    """`IdeficsForVisionText2Text`, the next token of a prompt that looks at a picture."""
    import jax.numpy as jnp

    from flax_vlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text
    from flax_vlm.training.objective import next_token

    model = IdeficsForVisionText2Text(
        IdeficsConfig.from_hf(sizes), dtype=jnp.dtype(dtype), param_dtype=jnp.float32, scan_layers=False
    )
    batch = words_and_image(sizes, 1)
    return ours(model, next_token(model), batch | {"labels": batch["input_ids"]})


def their_idefics(sizes: Sizes, dtype: str) -> Work:
    """Without tokens beside the vocabulary, whose loss its present release cannot compute."""
    import torch
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    torch.manual_seed(0)
    sizes = {**sizes, "additional_vocab_size": 0}
    model = IdeficsForVisionText2Text._from_config(IdeficsConfig(**sizes), attn_implementation="sdpa")
    batch = words_and_image(sizes, 1)
    return theirs(model, batch | {"labels": batch["input_ids"]}, dtype, lambda output: output.loss)


def ours(model: Any, objective: Any, batch: dict[str, np.ndarray]) -> Work:
    """The step of `flax_vlm.training`, nothing recomputed."""
    import jax
    from flax.linen import meta

    from flax_vlm.training.metrics import count_flops
    from flax_vlm.training.optimizer import OptimizerConfig, make_optimizer
    from flax_vlm.training.step import TrainState, compiled_step, make_step

    example: dict[str, Any] = model.example_inputs()
    params = jax.jit(lambda key: meta.unbox(model.init(key, **example))["params"])(jax.random.key(0))
    config = OptimizerConfig(learning_rate=RATE, schedule="constant", weight_decay=0.01, clip_norm=None)
    optimizer = make_optimizer(config, params, total_steps=10**6)
    states = [TrainState.create(params, {}, optimizer, jax.random.key(1), dtype=model.dtype)]
    del params
    step = make_step(objective, optimizer)
    rows = jax.device_put(batch)
    jax.block_until_ready((states, rows))
    flops, held = (
        count_flops(jax.make_jaxpr(step)(states[0], rows)),
        sum(each.nbytes for each in jax.tree.leaves(states)),
    )

    compiled = compiled_step(step)

    def run() -> Any:
        state, metrics = compiled(states.pop(), rows)
        states.append(state)
        return jax.block_until_ready((metrics.loss, state.params))[0]

    # At least all of the state is read once and written once.
    return Work(run=run, as_numpy=np.asarray, phases=(Phase(flops, 2 * held),), dtype=str(model.dtype))


def theirs(model: Any, batch: dict[str, np.ndarray], dtype: str, loss: Callable[[Any], Any]) -> Work:
    """torch's fused AdamW."""
    import torch

    model.to(device.of_torch()).train()
    rows = {name: torch.from_numpy(each).to(device.of_torch()) for name, each in batch.items()}
    rows = {name: each if each.is_floating_point() else each.long() for name, each in rows.items()}
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01, fused=True)
    casting = torch.autocast(device.of_torch(), torch.bfloat16, enabled=dtype == "bfloat16")

    def run() -> Any:
        optimizer.zero_grad()
        with casting:
            value = loss(model(**rows))
        value.backward()
        optimizer.step()
        return value.detach()

    return device.torch_work(run)
