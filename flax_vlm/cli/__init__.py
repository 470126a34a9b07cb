"""flax-vlm: the command line. Each command imports what it needs when it runs, so that --help comes at once."""

import sys
from collections.abc import Sequence

from . import checks, evaluate, pictures, plan, records, talk, train, weights  # noqa: F401, they register their commands
from .app import app
from .compile_cache import keep_compiled
from .large_pages import start_again

_ABOUT = (
    "Vision-language models in JAX: convert checkpoints from and to PyTorch, and use them. --debug shows tracebacks."
)
# Mistakes of a person, which get one sentence; anything else is ours, and gets a traceback.
_MISTAKES = (ValueError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; exit code 2 and one sentence for a mistake of the caller's (with --debug, a traceback).

    Without `arguments` it is the program of this process, takes those of the process, keeps what it compiles, and
    trains with large pages of memory.
    """
    if arguments is None:
        if sys.argv[1:2] == ["train"]:
            start_again()
        keep_compiled()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    if arguments[:1] == ["train"] and not "".join(arguments[1:2]).startswith("-"):
        arguments.insert(2, "--")  # what comes after a recipe are fields of its config, which the command reads
    try:
        app.cli(prog="flax-vlm", description=_ABOUT, args=arguments)
    except _MISTAKES as error:
        if debug:
            raise
        print(f"flax-vlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells say it
    return 0
