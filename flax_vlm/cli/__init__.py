"""flax-vlm: the command line. Each command imports what it needs when it runs, so that --help comes at once."""

import sys
from collections.abc import Sequence

from . import checks, pictures, talk, weights  # noqa: F401, they register their commands
from .app import app

_ABOUT = (
    "Vision-language models in JAX: convert checkpoints from and to PyTorch, and use them. --debug shows tracebacks."
)
# Mistakes of a person, which get one sentence; anything else is ours, and gets a traceback.
_MISTAKES = (ValueError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; exit code 2 and one sentence for a mistake of the caller's (with --debug, a traceback)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        app.cli(prog="flax-vlm", description=_ABOUT, args=[word for word in arguments if word != "--debug"])
    except _MISTAKES as error:
        if debug:
            raise
        print(f"flax-vlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells say it
    return 0
