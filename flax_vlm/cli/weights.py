"""Commands for people who move weights."""

from pathlib import Path
from typing import Literal

import tyro

from .app import app

DType = Literal["float64", "float32", "float16", "bfloat16"]


@app.command
def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    dtype: DType | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a PyTorch checkpoint (a folder, or a repository on the Hub) to a native one.

    Args:
        source: Folder with config.json and weights, or a name such as BAAI/AltCLIP.
        target: Folder to write.
        dtype: Cast the weights; by default they keep their own.
        overwrite: Replace a checkpoint that is there.
    """
    from flax_vlm.convert import to_flax

    to_flax(source, target, dtype=dtype, overwrite=overwrite)
    print(f"{source} -> {target} (native)")


@app.command
def export(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    /,
    dtype: DType | None = None,
    key_style: Literal["v4", "v5"] = "v4",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Convert a native checkpoint to a PyTorch one that transformers loads.

    Args:
        source: Folder of a native checkpoint.
        target: Folder to write.
        dtype: Cast the weights; by default they keep their own.
        key_style: Tensor names of transformers 4.x (5.x reads them too), or those of 5.x.
        max_shard_size: Largest size of one file, such as 2GB.
        overwrite: Replace a checkpoint that is there.
    """
    from flax_vlm.convert import to_torch

    to_torch(source, target, dtype=dtype, key_style=key_style, max_shard_size=max_shard_size, overwrite=overwrite)
    print(f"{source} -> {target} (PyTorch)")
