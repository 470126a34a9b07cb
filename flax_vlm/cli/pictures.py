"""Commands for people who have pictures, and an AltCLIP to look at them."""

from collections.abc import Sequence
from pathlib import Path

import tyro

from .app import app


@app.command
def classify(
    images: tyro.conf.Positional[tuple[Path, ...]],
    /,
    model: str,
    labels: tuple[str, ...],
    template: str = "{}",
) -> None:
    """Say which label fits each picture, with probabilities.

    Args:
        images: Picture files.
        model: An AltCLIP checkpoint: a folder (PyTorch or native) or a repository on the Hub.
        labels: Two or more words or sentences, in any language the model reads.
        template: A sentence to put each label in, with {} as its place.
    """
    from rich.console import Console
    from rich.table import Table

    from flax_vlm import from_pretrained, zero_shot

    probabilities = zero_shot.classify(from_pretrained(model), images, labels, template=template)
    table = Table("picture", "label", "probability", "next")
    for image, row in zip(images, probabilities, strict=True):
        first, *others = row.argsort()[::-1][:4]
        runners_up = ", ".join(f"{labels[i]} {row[i]:.1%}" for i in others)
        table.add_row(image.name, f"[bold green]{labels[first]}", f"{row[first]:.1%}", f"[dim]{runners_up}")
    Console().print(table)


@app.command
def embed(
    output: tyro.conf.Positional[Path],
    /,
    model: str,
    images: tuple[Path, ...] = (),
    texts: Path | None = None,
    batch_size: int = 32,
) -> None:
    """Write the unit vectors of pictures, or of the lines of a text file, as one .npy array [N, E].

    Args:
        output: File to write; .npy is appended where it is missing.
        model: An AltCLIP checkpoint: a folder (PyTorch or native) or a repository on the Hub.
        images: Picture files, or folders of them (in the order of their names).
        texts: A UTF-8 text file, one text a line.
        batch_size: How many go through the model at once.
    """
    import numpy as np
    from tqdm import tqdm

    from flax_vlm import from_pretrained, zero_shot

    if bool(images) == bool(texts):
        raise ValueError("give --images or --texts, one of them")
    how = {"batch_size": batch_size, "progress": tqdm}
    if texts:
        lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line]
        vectors = zero_shot.embed_texts(from_pretrained(model), lines, **how)
    else:
        vectors = zero_shot.embed_images(from_pretrained(model), _pictures(images), **how)
    output = output if output.suffix == ".npy" else output.with_name(f"{output.name}.npy")
    np.save(output, vectors)
    print(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]}")


@app.command
def demo(examples: Path = Path(__file__).parents[2] / "examples", output: Path = Path("demo-output")) -> None:
    """Convert the two small models of this repository: one reads handwritten digits, one talks about them.

    Args:
        examples: The folder of that name in a checkout of the repository.
        output: Folder for the contact sheet.
    """
    from flax_vlm import demo

    demo.run(examples, output)


def _pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the pictures in them."""
    from PIL import Image

    endings = Image.registered_extensions()
    found: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in endings) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: expected pictures in this folder, found none")
        found += inside
    return found
