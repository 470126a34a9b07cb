"""Names of released checkpoints with shapes of a few kilobytes."""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from benchmarks.conversion import names

# Real sizes -> tiny ones.
SIZES = {
    "AltCLIP": {250002: 40, 1024: 16, 4096: 24, 768: 8, 514: 20, 257: 5, 224: 4, 14: 2, 16: 2, 24: 2},
    "idefics-9b": {32000: 64, 4096: 32, 11008: 48, 1280: 16, 5120: 64, 1536: 8, 257: 5, 14: 2, 128: 4, 32: 8, 6: 2},
}
SIZES["idefics-9b"] |= {8: 2, 16: 2, 64: 4, 96: 4, 224: 4}
SIZES["glm-4v-9b"] = {151552: 64, 4096: 32, 4608: 64, 27392: 40, 13696: 20, 1792: 16, 5376: 48, 15360: 24, 6401: 17}
SIZES["glm-4v-9b"] |= {1120: 8, 14: 2, 40: 2, 63: 3, 32: 4, 128: 8, 16: 2, 151339: 62, 151340: 63}


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """The benchmark of conversion reads these, which are written into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, sizes in SIZES.items():
        swap = partial(_swap, sizes)
        for file in (names.FOLDER / f"{name}.txt", names.CONFIGS / f"{name.lower()}.json"):
            text = re.sub(r"(?<=[ x])\d+(?=[\s,])", swap, file.read_text("ascii"))
            (folder / file.name).write_text(text, "ascii")
    with mock.patch.multiple(names, FOLDER=folder, CONFIGS=folder):
        yield


def _swap(sizes: dict[int, int], number: re.Match[str]) -> str:
    return str(sizes.get(int(number[0]), number[0]))
