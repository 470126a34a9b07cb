"""Large pages of memory for what a training step takes and gives back: Linux, glibc 2.35 or newer.

XLA takes the memory of gradients and temporaries anew from the system in every step on a CPU. In pages of 4 KB that can
take as long as half of the arithmetic (`python -m benchmarks "train step"`), in pages of 2 MB next to nothing.
"""

import os
import platform
import sys
from pathlib import Path

_TUNABLES, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """What to add to the environment of a process before it starts; nothing where it is no use, or was chosen."""
    chosen = os.environ.get(_TUNABLES, "")
    if _TUNABLE in chosen or not _is_of_use():
        return {}
    return {_TUNABLES: ":".join(filter(None, (chosen, f"{_TUNABLE}=1")))}


def start_again() -> None:
    """Starts this process anew with large pages, unless it has them: glibc reads the setting at the start only."""
    if added := environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)


def _is_of_use() -> bool:
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    try:
        return "[madvise]" in _KERNEL.read_text()  # programs must ask; under [always] they have them, under [never] not
    except OSError:
        return False
