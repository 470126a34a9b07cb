"""Prints how much of what the checkpoint says about scenes of held-out digits is right, in each language.

python examples/glm4v-digits/evaluate.py [--write-card]
"""

import argparse
from pathlib import Path

import model_card
from rich.console import Console

import flax_vlm
from flax_vlm import demo

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out accuracy of checkpoint/, language by language.")
    parser.add_argument("--write-card", action="store_true", help="write the numbers to the model card too")
    options = parser.parse_args()
    talk = demo.ask_about_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
    Console().print(demo.scenes_table(talk))
    if options.write_card:
        model_card.write(HERE, talk)


if __name__ == "__main__":
    main()
