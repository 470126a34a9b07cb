"""Trains a small IDEFICS to talk about handwritten digits in four languages, and exports it in PyTorch's layout.

    python examples/idefics-digits/train.py                  # three minutes on two busy cores
    python examples/idefics-digits/train.py --validate 240   # how settings were chosen; writes nothing here

As IDEFICS was, it is built on an image tower that is there already, and stays frozen: that of the AltCLIP beside it.
It puts the tower, with random weights around it, and questions into build/idefics-digits, runs recipe.py on them, and
writes checkpoint/, with its model card, and heldout.npz, the pictures that neither of them ever saw. Any other
argument, such as --steps 500, is a field of the recipe.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import model_card
import numpy as np
import recipe
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
from flax_vlm.pretrained import VLM
from flax_vlm.processing import IdeficsProcessor, ImageProcessor
from flax_vlm.training.data.records import Record

sys.path.append(str(Path(__file__).parents[2]))
from examples import pictures, training

HERE = Path(__file__).parent
SEED = 0
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
    options, fields = parser.parse_known_args()
    validate = options.validate

    learning, held_out = pictures.load()
    if validate:
        learning, held_out = pictures.split(learning, validate)
    speeches = demo.read_speeches(HERE)
    tokenizer = make_tokenizer(speeches)
    size = {"height": pictures.SIZE, "width": pictures.SIZE}
    pixels = ImageProcessor(size=size, do_center_crop=False, image_mean=0.5, image_std=0.5)
    additional = len(tokenizer.additional_special_tokens)
    tower = flax_vlm.from_pretrained(TOWER, model_class=AltCLIPVisionModel)
    model = IdeficsForVisionText2Text(make_config(len(tokenizer) - additional, additional, tower.config))
    params = training.initial_params(model, SEED)
    params["model"]["vision_model"] = tower.params
    start = VLM(model, params, IdeficsProcessor(pixels, tokenizer))
    training.begin(recipe.FOLDER, start, questions(Questions(speeches, learning.labels), learning))
    trained = training.train(recipe.FOLDER, HERE / "recipe.py", fields)

    if validate:
        asked = demo.make_questions(speeches, held_out.labels)
        talk = demo.ask(flax_vlm.from_pretrained(trained), asked, held_out.images)
    else:
        np.savez_compressed(HERE / "heldout.npz", images=held_out.images, labels=held_out.labels)
        training.export(trained, HERE / "checkpoint")
        talk = demo.ask_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
        model_card.write(HERE, talk)
    Console().print(demo.talk_table(talk))


def questions(draw: Questions, learning: pictures.Digits) -> Iterator[Record]:
    """As many as the recipe's steps take, so that none comes twice."""
    rng = np.random.default_rng(SEED)
    for _ in range(recipe.CONFIG.steps * recipe.CONFIG.batch_size):
        question = draw.draw(rng)
        items = question.items([pictures.augment(rng, learning.images[i]) for i in question.pictures])
        content = [
            {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item}
            for item in items
        ]
        yield {"question": content, "answer": question.answer}


if __name__ == "__main__":
    main()
