"""Trains a small IDEFICS to talk about handwritten digits in four languages, and exports it in PyTorch's layout.

    python examples/idefics-digits/train.py                  # four minutes on two busy cores
    python examples/idefics-digits/train.py --validate 240   # how settings were chosen; writes nothing

As IDEFICS was, it is built on an image tower that is there already, and stays frozen: that of the AltCLIP beside it.
It writes checkpoint/, with its model card, and heldout.npz, the pictures that neither of them ever saw.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import model_card
import numpy as np
from jaxtyping import Array, Float
from prompts import Questions, make_tokenizer
from rich.console import Console

import flax_vlm
from flax_vlm import (
    AltCLIPVisionConfig,
    AltCLIPVisionModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsPerceiverConfig,
    IdeficsVisionConfig,
    demo,
)
from flax_vlm.models.idefics import trainable
from flax_vlm.pretrained import VLM
from flax_vlm.processing import IdeficsProcessor, ImageProcessor

sys.path.append(str(Path(__file__).parents[2]))
from examples import pictures, training

HERE = Path(__file__).parent
SEED = 0
STEPS = 800
PROMPTS = 32  # in a batch
TOKENS = 32  # of a prompt and its answer; the longest have 31
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
TOWER = HERE.parent / "altclip-digits" / "checkpoint"


def make_config(vocab_size: int, additional_vocab_size: int, vision_config: AltCLIPVisionConfig) -> IdeficsConfig:
    """All that the released models have, small; the gates start open, as the language model is not pretrained."""
    return IdeficsConfig(
        vocab_size=vocab_size,
        additional_vocab_size=additional_vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.06,
        alpha_initializer="ones",
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        freeze_text_layers=False,
        vision_config=IdeficsVisionConfig(**dataclasses.asdict(vision_config)),
        perceiver_config=IdeficsPerceiverConfig(
            resampler_n_latents=4,
            resampler_depth=1,
            resampler_n_heads=4,
            resampler_head_dim=24,
            qk_layer_norms_perceiver=True,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the IDEFICS of this folder and writes it to checkpoint/.")
    parser.add_argument("--validate", type=int, metavar="N", help="set N training pictures aside and test on them")
    validate = parser.parse_args().validate

    learning, held_out = pictures.load()
    if validate:
        learning, held_out = pictures.split(learning, validate)
    speeches = demo.read_speeches(HERE)
    tokenizer = make_tokenizer(speeches)
    size = {"height": pictures.SIZE, "width": pictures.SIZE}
    pixels = ImageProcessor(size=size, do_center_crop=False, image_mean=0.5, image_std=0.5)
    processor = IdeficsProcessor(pixels, tokenizer)
    additional = len(tokenizer.additional_special_tokens)
    tower = flax_vlm.from_pretrained(TOWER, model_class=AltCLIPVisionModel)
    model = IdeficsForVisionText2Text(make_config(len(tokenizer) - additional, additional, tower.config))
    params = training.initial_params(model, SEED)
    params["model"]["vision_model"] = tower.params
    sizes = jax.tree.map(jnp.size, params)
    learns = trainable(model.config, params)
    learnt = jax.tree.map(lambda size, learns: size * learns, sizes, learns)
    total, of_them = (sum(jax.tree.leaves(counts)) for counts in (sizes, learnt))
    print(f"{total:,} parameters, of which {of_them:,} learn; {len(learning.labels)} pictures")

    def loss(params: Any, batch: training.Batch, rng: Array) -> Float[Array, ""]:
        return model.apply({"params": params}, **batch).loss  # pyright: ignore[reportAttributeAccessIssue] - no tuple

    params = training.train(
        loss,
        params,
        batches(processor, Questions(speeches, learning.labels), learning),
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        trainable=learns,
    )

    if validate:
        vlm = VLM(model, params, processor, flax_vlm.GenerationConfig(eos_token_id=tokenizer.eos_token_id))
        talk = demo.ask(vlm, demo.make_questions(speeches, held_out.labels), held_out.images)
    else:
        np.savez_compressed(HERE / "heldout.npz", images=held_out.images, labels=held_out.labels)
        training.export(VLM(model, params, processor), HERE / "checkpoint")
        talk = demo.ask_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
        model_card.write(HERE, talk)
    Console().print(demo.talk_table(talk))


def batches(
    processor: IdeficsProcessor, questions: Questions, learning: pictures.Digits
) -> Callable[[], dict[str, np.ndarray]]:
    """Draws questions with their answers; only the answers are to be learnt."""
    rng = np.random.default_rng(SEED)
    tokenizer = processor.tokenizer

    def draw() -> dict[str, np.ndarray]:
        drawn = [questions.draw(rng) for _ in range(PROMPTS)]
        rows = []
        for question in drawn:
            prompt = question.items([pictures.augment(rng, learning.images[i]) for i in question.pictures])
            rows.append([*prompt[:-1], prompt[-1] + question.answer])
        inputs = processor(rows, add_eos_token=True, padding="max_length", max_length=TOKENS)
        lengths = [len(tokenizer.backend.encode(question.answer)) + 1 for question in drawn]
        is_answer = np.arange(TOKENS) >= TOKENS - np.array(lengths)[:, None]
        return inputs | {"labels": np.where(is_answer, inputs["input_ids"], -100)}

    return draw


if __name__ == "__main__":
    main()
