"""Trains a small AltCLIP on handwritten digits with captions in six languages, and exports it to PyTorch's layout.

    python examples/altclip-digits/train.py                  # about four minutes on two cores
    python examples/altclip-digits/train.py --validate 240   # how the settings were chosen: nothing is written

It writes beside itself: checkpoint/ with its model card, and heldout.npz, the pictures that it never saw.

B pairs in a batch   G groups of ten in it   T tokens   E width of the common space
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import captions
import jax
import jax.numpy as jnp
import model_card
import numpy as np
import optax
import pictures
from flax import linen as nn
from jaxtyping import Array, Float

from flax_vlm import AltCLIPConfig, AltCLIPModel, AltCLIPTextConfig, AltCLIPVisionConfig, convert, demo
from flax_vlm.models.altclip.model import contrastive_loss
from flax_vlm.pretrained import VLM
from flax_vlm.processing import AltCLIPProcessor, ImageProcessor

HERE = Path(__file__).parent
SEED = 0
STEPS = 1000
GROUPS = 8
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
LARGEST_LOGIT_SCALE = float(np.log(100))  # CLIP's
TOKENS = 32  # that the text tower has positions for


def config(vocab_size: int) -> AltCLIPConfig:
    """About a million parameters, four fifths of them in the eyes."""
    return AltCLIPConfig(
        projection_dim=64,
        text_config=AltCLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=TOKENS + 2,  # positions start behind the padding's
            project_dim=80,
        ),
        vision_config=AltCLIPVisionConfig(
            hidden_size=128,
            intermediate_size=448,
            projection_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=pictures.SIZE,
            patch_size=8,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--validate", type=int, metavar="N", help="set N training pictures aside and report on them")
    options = parser.parse_args()

    training, held_out = pictures.load()
    if options.validate:
        training, held_out = pictures.split(training, options.validate)
    processor = AltCLIPProcessor(
        ImageProcessor(size=pictures.SIZE, crop_size=pictures.SIZE, image_mean=0.5, image_std=0.5),
        captions.train_tokenizer(400),
    )
    model = AltCLIPModel(config(len(processor.tokenizer)))
    params = nn.meta.unbox(model.init(jax.random.key(SEED), **model.example_inputs())["params"])
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {len(training.labels)} pictures")

    start = time.perf_counter()
    params = train(model, params, processor, training, options.steps)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    vlm = VLM(model, params, processor)
    if options.validate:
        print(model_card.table(demo.evaluate(vlm, HERE, held_out.images, held_out.labels)))
        return
    np.savez_compressed(HERE / "heldout.npz", images=held_out.images, labels=held_out.labels)
    export(vlm)


def export(vlm: VLM) -> None:
    """Writes checkpoint/ in PyTorch's layout, with a card that reports on what was written."""
    with tempfile.TemporaryDirectory() as folder:
        vlm.save_pretrained(Path(folder) / "native")
        convert.to_torch(Path(folder) / "native", HERE / "checkpoint", overwrite=True)
    model_card.write(HERE)


class State(NamedTuple):
    params: Any
    optimizer: optax.OptState
    rng: Array


def train(model: AltCLIPModel, params: Any, processor: AltCLIPProcessor, training: pictures.Digits, steps: int) -> Any:
    """The parameters after `steps` steps, of which the last is kept whatever it is."""
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 20, steps)
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices)
    )

    def loss(params: Any, batch: dict[str, Array], rng: Array) -> Float[Array, ""]:
        out = model.apply({"params": params}, **batch, deterministic=False, rngs={"dropout": rng})
        return grouped_loss(out.text_embeds, out.image_embeds, params["logit_scale"])

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: dict[str, Array]) -> tuple[State, Float[Array, ""]]:
        rng, dropout = jax.random.split(state.rng)
        value, gradients = jax.value_and_grad(loss)(state.params, batch, dropout)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], LARGEST_LOGIT_SCALE)
        return State(params, optimizer_state, rng), value

    state = State(params, optimizer.init(params), jax.random.key(SEED, impl="rbg"))
    batches = Batches(processor, training)
    start, losses = time.perf_counter(), []
    for number in range(1, steps + 1):
        state, value = step(state, batches.draw())
        losses.append(value)
        if number % 100 == 0 or number == steps:
            scale, seconds = np.exp(state.params["logit_scale"]), time.perf_counter() - start
            print(f"step {number:5}  loss {np.mean(losses):.4f}  scale {scale:5.1f}  {seconds:4.0f} s", flush=True)
            losses.clear()
    return state.params


def grouped_loss(
    text_embeds: Float[Array, "B E"], image_embeds: Float[Array, "B E"], logit_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """AltCLIP's contrastive loss within each group of ten different digits.

    Over the whole batch the other sevens would be false negatives of a seven.
    """
    texts, images = (embeds.reshape(-1, 10, embeds.shape[-1]) for embeds in (text_embeds, image_embeds))
    logits = jnp.einsum("gte,gie->gti", texts, images) * jnp.exp(logit_scale)
    return jax.vmap(contrastive_loss)(logits).mean()


class Batches:
    """Draws groups of ten: every digit once, in a picture of its own and a caption of its own."""

    def __init__(self, processor: AltCLIPProcessor, training: pictures.Digits) -> None:
        self.processor = processor
        self.images = [training.images[training.labels == digit] for digit in captions.DIGITS]
        self.captions = [
            [captions.captions_of(language, digit) for digit in captions.DIGITS]
            for language in demo.read_languages(HERE)
        ]
        self.rng = np.random.default_rng(SEED)

    def draw(self) -> dict[str, np.ndarray]:
        """The model's inputs, for GROUPS groups."""
        texts = [text for _ in range(GROUPS) for text in captions.draw(self.rng, self.captions)]
        chosen = [images[self.rng.integers(len(images))] for _ in range(GROUPS) for images in self.images]
        images = [pictures.augment(self.rng, image) for image in chosen]
        return self.processor(texts, images, padding="max_length", max_length=16)


if __name__ == "__main__":
    main()
