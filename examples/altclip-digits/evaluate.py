"""Prints how many of the held-out digits the checkpoint reads, in each language.

python examples/altclip-digits/evaluate.py [--write-card]
"""

import argparse
from pathlib import Path

import model_card
from rich.console import Console

import flax_vlm
from flax_vlm import demo

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out zero-shot accuracy of checkpoint/, language by language.")
    parser.add_argument("--write-card", action="store_true", help="write the numbers to the model card too")
    options = parser.parse_args()
    reading = demo.read_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
    Console().print(demo.accuracy_table(reading))
    if options.write_card:
        model_card.write(HERE, reading)


if __name__ == "__main__":
    main()
