"""What both parts of the demo need of a terminal."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.text import Text

import flax_vlm
from flax_vlm.pretrained import VLM


@contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Says what is being done, and how long it took."""
    console.print(f"{what} ...", highlight=False, soft_wrap=True, end=" ")
    start = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)


def converted(console: Console, example: Path) -> VLM:
    """Converts the PyTorch checkpoint of an example, and loads it."""
    from flax_vlm import convert

    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / example.name
        with step(console, f"Converting {example / 'checkpoint'} from PyTorch to JAX"):
            convert.to_flax(example / "checkpoint", native)
        with step(console, "Loading it with flax_vlm.from_pretrained"):
            return flax_vlm.from_pretrained(native)


def thumbnail(image: UInt8[np.ndarray, "8 8"], coloured: bool) -> Text:
    """A picture in four lines of eight characters, each of which is two pixels, one above the other."""
    text = Text()
    for above, below in zip(image[::2].tolist(), image[1::2].tolist(), strict=True):
        for top, bottom in zip(above, below, strict=True):
            if coloured:
                text.append("▀", f"rgb({top},{top},{top}) on rgb({bottom},{bottom},{bottom})")
            else:
                text.append(" ▄▀█"[2 * (top > 127) + (bottom > 127)])
        text.append("\n")
    text.rstrip()
    return text
