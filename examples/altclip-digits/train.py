"""Trains a small AltCLIP on handwritten digits with captions in six languages, and exports it in PyTorch's layout.

    python examples/altclip-digits/train.py                  # seven minutes on two busy cores
    python examples/altclip-digits/train.py --validate 240   # how settings were chosen; writes nothing

It writes checkpoint/, with its model card, and heldout.npz, the pictures that it never saw.

B pairs in a batch   G groups of ten pairs   E width of the common space
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import model_card
import numpy as np
import optax
import pictures
from captions import Captions, train_tokenizer
from flax import linen as nn
from jaxtyping import Array, Float
from rich.console import Console

import flax_vlm
from flax_vlm import AltCLIPConfig, AltCLIPModel, AltCLIPTextConfig, AltCLIPVisionConfig, convert, demo
from flax_vlm.models.altclip.model import contrastive_loss
from flax_vlm.pretrained import VLM
from flax_vlm.processing import AltCLIPProcessor, ImageProcessor

HERE = Path(__file__).parent
SEED = 0
STEPS = 2000
GROUPS = 8
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
CAPTION_TOKENS = 20  # the longest has 19


def make_config(vocab_size: int) -> AltCLIPConfig:
    """A million parameters, four fifths of them in the image tower."""
    text = AltCLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=34,  # two of them belong to the padding
        project_dim=80,
    )
    vision = AltCLIPVisionConfig(
        hidden_size=128,
        intermediate_size=448,
        projection_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=pictures.SIZE,
        patch_size=8,
    )
    return AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=64)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the AltCLIP of this folder and writes it to checkpoint/.")
    parser.add_argument("--validate", type=int, metavar="N", help="set N training pictures aside and test on them")
    validate = parser.parse_args().validate

    training, held_out = pictures.load()
    if validate:
        training, held_out = pictures.split(training, validate)
    languages = demo.read_languages(HERE)
    tokenizer = train_tokenizer(languages)
    pixels = ImageProcessor(size=pictures.SIZE, crop_size=pictures.SIZE, image_mean=0.5, image_std=0.5)
    processor = AltCLIPProcessor(pixels, tokenizer)
    model = AltCLIPModel(make_config(len(tokenizer)))
    example_inputs: dict[str, Any] = model.example_inputs()
    params = nn.meta.unbox(model.init(jax.random.key(SEED), **example_inputs)["params"])
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {len(training.labels)} pictures")
    params = train(model, params, batches(processor, Captions(languages), training))

    vlm = VLM(model, params, processor)
    if validate:
        reading = demo.read_pictures(vlm, languages, *held_out)
    else:
        np.savez_compressed(HERE / "heldout.npz", images=held_out.images, labels=held_out.labels)
        export(vlm)
        reading = demo.read_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
        model_card.write(HERE, reading)
    Console().print(demo.accuracy_table(reading))


def export(vlm: VLM) -> None:
    """Writes checkpoint/ in PyTorch's layout."""
    with tempfile.TemporaryDirectory() as folder:
        vlm.save_pretrained(Path(folder) / "native")
        convert.to_torch(Path(folder) / "native", HERE / "checkpoint", overwrite=True)


def batches(
    processor: AltCLIPProcessor, captions: Captions, training: pictures.Digits
) -> Callable[[], dict[str, np.ndarray]]:
    """Draws the inputs of GROUPS groups, each with one picture and one caption of every digit."""
    rng = np.random.default_rng(SEED)
    of_digit = [training.images[training.labels == digit] for digit in range(10)]

    def draw() -> dict[str, np.ndarray]:
        texts = [caption for _ in range(GROUPS) for caption in captions.draw(rng)]
        chosen = [images[rng.integers(len(images))] for _ in range(GROUPS) for images in of_digit]
        augmented = [pictures.augment(rng, image) for image in chosen]
        return processor(texts, augmented, padding="max_length", max_length=CAPTION_TOKENS, truncation=False)

    return draw


class State(NamedTuple):
    params: Any
    optimizer: optax.OptState
    rng: Array


def train(model: AltCLIPModel, params: Any, draw: Callable[[], dict[str, np.ndarray]]) -> Any:
    """The parameters after STEPS steps; none before them is looked at."""
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, STEPS // 20, STEPS)
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices)
    )

    def loss(params: Any, batch: dict[str, Any], rng: Array) -> Float[Array, ""]:
        out: Any = model.apply({"params": params}, **batch, deterministic=False, rngs={"dropout": rng})
        return grouped_loss(out.text_embeds, out.image_embeds, params["logit_scale"])

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: dict[str, Any]) -> tuple[State, Float[Array, ""]]:
        rng, dropout = jax.random.split(state.rng)
        value, gradients = jax.value_and_grad(loss)(state.params, batch, dropout)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state, rng), value

    # On a CPU the default generator would take as long for the dropout as the model for everything else.
    state = State(params, optimizer.init(params), jax.random.key(SEED, impl="rbg"))
    start, losses = time.perf_counter(), []
    for number in range(1, STEPS + 1):
        state, value = step(state, draw())
        losses.append(value)
        if number % 100 == 0:
            print(f"step {number:5}   loss {np.mean(losses):.4f}   {time.perf_counter() - start:4.0f} s", flush=True)
            losses.clear()
    return state.params


def grouped_loss(
    text_embeds: Float[Array, "B E"], image_embeds: Float[Array, "B E"], logit_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """AltCLIP's contrastive loss within each group of ten different digits.

    Over the whole batch a seven would have the other sevens for negatives.
    """
    texts, images = (embeds.reshape(-1, 10, embeds.shape[-1]) for embeds in (text_embeds, image_embeds))
    logits = jnp.einsum("gte,gie->gti", texts, images) * jnp.exp(logit_scale)
    return jax.vmap(contrastive_loss)(logits).mean()


if __name__ == "__main__":
    main()
