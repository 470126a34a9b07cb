"""Trains a small AltCLIP on handwritten digits with captions in six languages, and exports it in PyTorch's layout.

    python examples/altclip-digits/train.py                  # eight minutes on two busy cores
    python examples/altclip-digits/train.py --validate 240   # how settings were chosen; writes nothing here

It puts random weights, and pictures with captions, into build/altclip-digits, runs recipe.py on them, and writes
checkpoint/, with its model card, and heldout.npz, the pictures that the model never saw. Any other argument, such as
--steps 500, is a field of the recipe.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import model_card
import numpy as np
import recipe
from captions import Captions, train_tokenizer
from rich.console import Console

import flax_vlm
from flax_vlm import AltCLIPConfig, AltCLIPModel, AltCLIPTextConfig, AltCLIPVisionConfig, demo
from flax_vlm.pretrained import VLM
from flax_vlm.processing import AltCLIPProcessor, ImageProcessor
from flax_vlm.training.data.records import Record

sys.path.append(str(Path(__file__).parents[2]))
from examples import pictures, training

HERE = Path(__file__).parent
SEED = 0
VARIANTS = 112  # of each picture: so many that none comes twice


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
    options, fields = parser.parse_known_args()
    validate = options.validate

    learning, held_out = pictures.load()
    if validate:
        learning, held_out = pictures.split(learning, validate)
    languages = demo.read_languages(HERE)
    tokenizer = train_tokenizer(languages)
    pixels = ImageProcessor(size=pictures.SIZE, crop_size=pictures.SIZE, image_mean=0.5, image_std=0.5)
    processor = AltCLIPProcessor(pixels, tokenizer)
    model = AltCLIPModel(make_config(len(tokenizer)))
    start = VLM(model, training.initial_params(model, SEED), processor)
    training.begin(recipe.FOLDER, start, pairs(Captions(languages), learning))
    trained = training.train(recipe.FOLDER, HERE / "recipe.py", fields)

    if validate:
        reading = demo.read_pictures(flax_vlm.from_pretrained(trained), languages, *held_out)
    else:
        np.savez_compressed(HERE / "heldout.npz", images=held_out.images, labels=held_out.labels)
        training.export(trained, HERE / "checkpoint")
        reading = demo.read_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
        model_card.write(HERE, reading)
    Console().print(demo.accuracy_table(reading))


def pairs(captions: Captions, learning: pictures.Digits) -> Iterator[Record]:
    """Every picture in several variants, each with a caption in every language."""
    rng = np.random.default_rng(SEED)
    for _ in range(VARIANTS):
        for image, digit in zip(*learning, strict=True):
            yield {"image": pictures.augment(rng, image), "texts": captions.draw(rng, digit)}


if __name__ == "__main__":
    main()
