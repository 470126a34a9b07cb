"""Converting and loading the 1.7 GB of AltCLIP, random weights under its names, from files that are in memory.

`python -m benchmarks.conversion` does so for larger ones, cold, and watches their memory.
"""

import mmap
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.cases import Case, Work
from benchmarks.conversion import COPY, NATIVE, PYTORCH, names
from benchmarks.conversion.synthetic import make_checkpoint

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "altclip-digits" / "checkpoint"


def cases(quick: bool) -> list[Case]:
    return [
        Case("checkpoint: convert 1.7 GB", {"flax_vlm": partial(convert, quick), "cp, sync": partial(copy, quick)}),
        Case(
            "checkpoint: load 1.7 GB of PyTorch's files",
            {
                "flax_vlm": partial(load, quick, PYTORCH),
                "reading them": partial(read, quick, PYTORCH),
                "torch, safetensors": partial(load_torch, quick),
            },
        ),
        Case(
            "checkpoint: load 1.7 GB of native files",
            {"flax_vlm": partial(load, quick, NATIVE), "reading them": partial(read, quick, NATIVE)},
        ),
    ]


def convert(quick: bool) -> Work:
    from flax_vlm.convert import port

    source = files(quick) / PYTORCH

    def run() -> None:
        port.to_flax(source, source.parent / "converted", overwrite=True)
        os.sync()

    return _done(run)


def copy(quick: bool) -> Work:
    source = files(quick) / PYTORCH
    target = source.parent / COPY

    def run() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        os.sync()

    return _done(run)


def load(quick: bool, layout: str) -> Work:
    """Until every page of the parameters is there: they may be the mapped files themselves."""
    import jax

    from flax_vlm import from_pretrained

    folder = files(quick) / layout

    def run() -> None:
        for array in jax.tree.leaves(from_pretrained(folder).params):
            _touch(np.asarray(array))

    return _done(run)


def load_torch(quick: bool) -> Work:
    import torch
    from safetensors.torch import load_file

    folder = files(quick) / PYTORCH

    def run() -> None:
        for file in folder.glob("*.safetensors"):
            for tensor in load_file(file).values():
                _touch(
                    tensor.view(torch.uint8).numpy() if tensor.dim() else tensor.reshape(1).view(torch.uint8).numpy()
                )

    return _done(run)


def read(quick: bool, layout: str) -> Work:
    folder = files(quick) / layout
    buffer = bytearray(8 << 20)

    def run() -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb", buffering=0) as stream:
                    while stream.readinto(buffer):
                        pass

    return _done(run)


def files(quick: bool) -> Path:
    """A folder with the checkpoint in both layouts; made once, and the same one again."""
    from flax_vlm import convert

    folder = ROOT / "build" / "benchmarks" / ("tiny" if quick else "altclip")
    if not (folder / NATIVE).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if quick:
            shutil.copytree(TINY, folder / PYTORCH)
        else:
            make_checkpoint(folder / PYTORCH, names.read("AltCLIP"))
        convert.to_flax(folder / PYTORCH, folder / NATIVE)
    return folder


def _touch(array: np.ndarray) -> None:
    array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max(initial=0)


def _done(run: Callable[[], None]) -> Work:
    """Work that leaves nothing to compare."""
    return Work(run=run, as_numpy=lambda _: np.zeros(1))
