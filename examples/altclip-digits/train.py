"""Trains a small AltCLIP on handwritten digits with captions in six languages, and exports it in PyTorch's layout.

    python examples/altclip-digits/train.py                  # seven minutes on two busy cores
    python examples/altclip-digits/train.py --validate 240   # how settings were chosen; writes nothing

It writes checkpoint/, with its model card, and heldout.npz, the pictures that it never saw.

B pairs in a batch   G groups of ten pairs   E width of the common space
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import model_card
import numpy as np
from captions import Captions, train_tokenizer
from jaxtyping import Array, Float
from rich.console import Console

import flax_vlm
from flax_vlm import AltCLIPConfig, AltCLIPModel, AltCLIPTextConfig, AltCLIPVisionConfig, demo
from flax_vlm.models.altclip.model import contrastive_loss
from flax_vlm.pretrained import VLM
from flax_vlm.processing import AltCLIPProcessor, ImageProcessor

sys.path.append(str(Path(__file__).parents[2]))
from examples import pictures, training

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

    learning, held_out = pictures.load()
    if validate:
        learning, held_out = pictures.split(learning, validate)
    languages = demo.read_languages(HERE)
    tokenizer = train_tokenizer(languages)
    pixels = ImageProcessor(size=pictures.SIZE, crop_size=pictures.SIZE, image_mean=0.5, image_std=0.5)
    processor = AltCLIPProcessor(pixels, tokenizer)
    model = AltCLIPModel(make_config(len(tokenizer)))
    params = training.initial_params(model, SEED)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {len(learning.labels)} pictures")

    def loss(params: Any, batch: training.Batch, rng: Array) -> Float[Array, ""]:
        out: Any = model.apply({"params": params}, **batch, deterministic=False, rngs={"dropout": rng})
        return grouped_loss(out.text_embeds, out.image_embeds, params["logit_scale"])

    params = training.train(
        loss,
        params,
        batches(processor, Captions(languages), learning),
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
    )

    vlm = VLM(model, params, processor)
    if validate:
        reading = demo.read_pictures(vlm, languages, *held_out)
    else:
        np.savez_compressed(HERE / "heldout.npz", images=held_out.images, labels=held_out.labels)
        training.export(vlm, HERE / "checkpoint")
        reading = demo.read_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
        model_card.write(HERE, reading)
    Console().print(demo.accuracy_table(reading))


def batches(
    processor: AltCLIPProcessor, captions: Captions, learning: pictures.Digits
) -> Callable[[], dict[str, np.ndarray]]:
    """Draws the inputs of GROUPS groups, each with one picture and one caption of every digit."""
    rng = np.random.default_rng(SEED)
    of_digit = [learning.images[learning.labels == digit] for digit in range(10)]

    def draw() -> dict[str, np.ndarray]:
        texts = [caption for _ in range(GROUPS) for caption in captions.draw(rng)]
        chosen = [images[rng.integers(len(images))] for _ in range(GROUPS) for images in of_digit]
        augmented = [pictures.augment(rng, image) for image in chosen]
        return processor(texts, augmented, padding="max_length", max_length=CAPTION_TOKENS, truncation=False)

    return draw


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
