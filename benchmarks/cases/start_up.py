"""How long a program takes to start: importing the package, and `flax-vlm --help`, each in a new interpreter."""

import subprocess
import sys
from functools import partial

import numpy as np

from benchmarks.cases import Case, Work

MODEL = "import flax_vlm; flax_vlm.AltCLIPModel, flax_vlm.from_pretrained"
PEER = "import jax, flax.linen"


def cases(quick: bool) -> list[Case]:
    """The peer of an import is the import of what the package stands on; --help is measured against the interpreter."""
    return [
        Case(
            "import, up to the model class and from_pretrained",
            {"flax_vlm": partial(python, "-c", MODEL), "jax, flax.linen": partial(python, "-c", PEER)},
        ),
        Case(
            "import of the package alone",
            {"flax_vlm": partial(python, "-c", "import flax_vlm"), "jax, flax.linen": partial(python, "-c", PEER)},
        ),
        Case(
            "flax-vlm --help",
            {
                "flax_vlm": partial(python, "-c", "from flax_vlm.cli import main; main(['--help'])"),
                "python alone": partial(python, "-c", ""),
            },
        ),
    ]


def python(*arguments: str) -> Work:
    """A new interpreter, from its start to its end."""

    def run() -> int:
        return subprocess.run([sys.executable, *arguments], check=True, capture_output=True).returncode

    return Work(run=run, as_numpy=np.asarray)
