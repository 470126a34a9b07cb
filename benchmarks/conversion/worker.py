"""One step of ours: `python -m benchmarks.conversion.worker STEP FOLDER [SHARD_SIZE]`.

FOLDER is that of the run. The last line printed is JSON: the seconds of the work, without start and imports.
"""

import json
import mmap
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.conversion import EXPORTED, NATIVE, PYTORCH
from flax_vlm import pretrained
from flax_vlm.convert import port


def convert(folder: Path) -> None:
    """PyTorch's files to native ones."""
    port.to_flax(folder / PYTORCH, folder / NATIVE)


def export(folder: Path, shard_size: str = "5GB") -> None:
    """Native files to PyTorch's."""
    port.to_torch(folder / NATIVE, folder / EXPORTED, max_shard_size=shard_size)


def load_pytorch(folder: Path) -> Any:
    """The parameters, from PyTorch's files."""
    return pretrained.from_pretrained(folder / PYTORCH).params


def load_native(folder: Path) -> Any:
    """The parameters, from native files."""
    return pretrained.from_pretrained(folder / NATIVE).params


STEPS: Mapping[str, Callable[..., Any]] = {each.__name__: each for each in (convert, export, load_pytorch, load_native)}


def main(step: str, folder: str, *options: str) -> None:
    start = time.perf_counter()
    for array in jax.tree.leaves(STEPS[step](Path(folder), *options)):
        # It may be the mapped file itself: it is loaded when its pages are in memory.
        np.asarray(array).reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max(initial=0)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
