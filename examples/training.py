"""From new parameters to a checkpoint in PyTorch's layout, through `flax-vlm train`."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from flax_vlm import cli, convert
from flax_vlm.pretrained import VLM
from flax_vlm.training.data.records import Record, write


def initial_params(model: Any, seed: int) -> Any:
    """Random parameters, without the names of their axes."""
    example_inputs: dict[str, Any] = model.example_inputs()
    return nn.meta.unbox(model.init(jax.random.key(seed), **example_inputs)["params"])


def begin(folder: Path, start: VLM, records: Iterable[Record]) -> None:
    """Fills a run's folder with what its recipe names: the model to start from, and records. What was there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start.save_pretrained(folder / "start")
    number = write(records, folder / "data.array_record")
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(start.params)):,} parameters, {number:,} records", flush=True)


def train(folder: Path, recipe: Path, fields: Sequence[str] = ()) -> Path:
    """Trains what `begin` has put into a folder, and returns the trained model's.

    Args:
      fields: of the recipe, as one would type them.
    """
    if code := cli.main(["train", str(recipe), *fields]):
        raise SystemExit(code)
    return folder / "run" / "model"


def export(trained: Path, target: Path) -> None:
    """Writes a checkpoint in PyTorch's layout, over the one that is there."""
    convert.to_torch(trained, target, overwrite=True)
    (target / "conversion.json").unlink()  # it tells of a folder that is not in the repository
