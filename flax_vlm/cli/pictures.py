"""Commands for people who have pictures, and an AltCLIP to look at them."""

from collections.abc import Sequence
from pathlib import Path

import tyro

from . import vectors
from .app import app
from .rows import NONE, Options, start, work_through


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
    field: str | None = None,
    rows: Options = NONE,
) -> None:
    """Write the unit vectors of pictures, of the lines of a text file, or of records, as one .npy array [N, E].

    Those of what cannot be read are NaN, up to --max-bad of them. Killed, the same command goes on.

    Args:
        output: File to write; .npy is appended where it is missing.
        model: An AltCLIP checkpoint: a folder (PyTorch or native) or a repository on the Hub.
        images: Picture files, or folders of them (in the order of their names).
        texts: A UTF-8 text file, one text a line.
        field: With --dataset, what of a record to embed: "image", which is the default, or a field with a text.
    """
    if [bool(images), bool(texts), bool(rows.dataset)].count(True) != 1:
        raise ValueError("expected --images, --texts or --dataset: pass one of them")
    if field and not rows.dataset:
        raise ValueError(f"--field {field} does nothing without --dataset: leave it out")
    start(rows)
    job = vectors.of_texts(texts) if texts else vectors.of_images(_pictures(images)) if images else None
    job = job or vectors.of_records(rows.dataset, field or "image")
    output = output if output.suffix == ".npy" else output.with_name(f"{output.name}.npy")
    work_through(model, output, job, rows, vectors.BATCH_SIZE, {})


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
