"""Commands for people who move weights."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from flax_vlm.progress import conversion_bar

from .app import app

if TYPE_CHECKING:
    from flax_vlm.convert.stream import Moved

DType = Literal["float64", "float32", "float16", "bfloat16"]


@app.command
def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[str],
    /,
    dtype: DType | None = None,
    only: Literal["text", "vision"] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Convert a PyTorch checkpoint (a folder, or a repository on the Hub) to a native one.

    Killed at any moment, the same command goes on where it was; until it is whole, there is no target.

    Args:
        source: Folder with config.json and weights, or a name such as BAAI/AltCLIP.
        target: Folder to write, or a gs:// address.
        dtype: Cast the weights; by default they keep their own.
        only: Take one tower out of the whole.
        overwrite: Replace a checkpoint that is there.
        dry_run: Match every name and shape, say what it would take, and write nothing.
        quiet: No progress bar, and no word at the end.
        json: Print what was done as JSON.
    """
    _leave_accelerators_alone()
    from flax_vlm.convert import port

    model_class = port.tower(source, only) if only else None
    if dry_run:
        outlook = port.outlook(source, dtype=dtype, model_class=model_class)
        print(outlook.to_json() if json else outlook)
        return
    with conversion_bar(hidden=quiet or json or None) as progress:
        moved = port.to_flax(
            source, target, dtype=dtype, model_class=model_class, overwrite=overwrite, progress=progress
        )
    _report(source, target, moved, quiet, json)


@app.command
def export(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    dtype: DType | None = None,
    key_style: Literal["v4", "v5"] = "v4",
    shard_size: str = "5GB",
    overwrite: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Convert a native checkpoint to a PyTorch one that transformers loads.

    Killed at any moment, the same command goes on where it was; until it is whole, there is no target.

    Args:
        source: Folder of a native checkpoint.
        target: Folder to write.
        dtype: Cast the weights; by default they keep their own.
        key_style: Tensor names of transformers 4.x (5.x reads them too), or those of 5.x.
        shard_size: Largest size of one file, such as 2GB.
        overwrite: Replace a checkpoint that is there.
        quiet: No progress bar, and no word at the end.
        json: Print what was done as JSON.
    """
    _leave_accelerators_alone()
    from flax_vlm.convert import to_torch

    with conversion_bar(hidden=quiet or json or None) as progress:
        moved = to_torch(
            source,
            target,
            dtype=dtype,
            key_style=key_style,
            max_shard_size=shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    _report(source, target, moved, quiet, json)


def _leave_accelerators_alone() -> None:
    """Moving weights needs none, and JAX would reserve most of their memory."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _report(source: str, target: str | Path, moved: "Moved", quiet: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"source": source, "target": str(target), **moved.to_json()}, indent=2))
    elif not quiet:
        found = f", {moved.resumed / 1e9:.2f} GB of it by a run before" if moved.resumed else ""
        size = f"{moved.tensors} tensors, {moved.nbytes / 1e9:.2f} GB{found}"
        print(f"{source} -> {target}: {size}, in {moved.seconds:.1f} s")
