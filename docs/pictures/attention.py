"""Draws attention.png, which the README shows: what a small IDEFICS read each word of an answer from.

    python docs/pictures/attention.py

It needs what `make test` installs, and nothing is downloaded.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import flax_vlm
from flax_vlm import viz
from flax_vlm.models.idefics import image_attention

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURE = Path(__file__).with_suffix(".png")
DIGITS = {"three": 3, "eight": 8, "six": 6}  # what the model is shown, and says


def draw(output: Path) -> str:
    """Writes the picture, and gives the answer that it is about."""
    viz.use_fonts(EXAMPLES / "altclip-digits" / "fonts")
    vlm: Any = flax_vlm.from_pretrained(EXAMPLES / "idefics-digits" / "checkpoint")
    shown = [_held_out(digit) for digit in DIGITS.values()]
    prompt = ["First", shown[0], ", then", shown[1], ", last", shown[2], ". They are"]
    inputs = vlm.processor([prompt])
    answered = vlm.generate(**inputs, max_new_tokens=8).sequences
    begin = inputs["input_ids"].shape[1]
    answer = vlm.processor.decode(answered[0, begin:]).strip()

    pieces = [vlm.processor.tokenizer.decode(int(index)).strip() for index in answered[0]]
    chosen_at = [pieces.index(word, begin) - 1 for word in DIGITS]  # a word is chosen by the token before it
    attention = image_attention(vlm.model, vlm.params, inputs, answered)
    heat = attention.through_text[0, chosen_at]  # [words, pictures, 4, 4]
    cells = [(picture, word) for picture in range(3) for word in range(3)]
    figure = viz.overlay(
        [shown[picture] for picture, _ in cells],
        [heat[word, picture] for picture, word in cells],
        titles=[list(DIGITS)[word] if picture == 0 else "" for picture, word in cells],
        notes=[f"{heat[word, picture].sum():.0%}" for picture, word in cells],
        columns=3,
        title=f"First ▢, then ▢, last ▢. They are {answer}",
    )
    figure.savefig(output, dpi=110)
    Image.open(output).convert("P", palette=Image.Palette.ADAPTIVE).save(output, optimize=True)
    return answer


def _held_out(digit: int) -> np.ndarray:
    """One that the model has never seen, at the size that it looks at."""
    with np.load(EXAMPLES / "idefics-digits" / "heldout.npz") as held_out:
        image = Image.fromarray(held_out["images"][np.flatnonzero(held_out["labels"] == digit)[1]])
    return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE))
