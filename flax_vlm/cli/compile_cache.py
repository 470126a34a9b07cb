"""Compiled programs that outlive a command: JAX's persistent cache, in the cache folder of the user."""

import hashlib
import os
import platform
from pathlib import Path

VARIABLE = "FLAX_VLM_COMPILATION_CACHE"  # a folder, or "off"
_SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",  # what compiles sooner is not worth a file
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(4 * 2**30),  # then what was not used for longest goes
}


def keep_compiled() -> None:
    """Has the next command find what this one compiles; to be called before jax is imported.

    The folder is flax_vlm/xla in $XDG_CACHE_HOME (~/.cache), unless `FLAX_VLM_COMPILATION_CACHE` names another or says
    "off". Whoever has set JAX's own JAX_COMPILATION_CACHE_DIR keeps what he chose.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = Path(chosen).expanduser() if chosen else _user_cache() / "flax_vlm" / "xla"
    folder = folder.absolute() / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written is no reason not to run
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def _user_cache() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"  # the XDG rule: a relative one does not count


def _processor() -> str:
    """Programs for a CPU use all it has, and homes are shared by machines that have different ones."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        able = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        able = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(able.encode()).hexdigest()[:8]}"
