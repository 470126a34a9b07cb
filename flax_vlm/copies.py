"""Native copies of PyTorch checkpoints, made when they are first asked for, beside the Hub's cache."""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Literal, TypeAlias

import flax_vlm
from flax_vlm import checkpoint
from flax_vlm.progress import conversion_bar

logger = logging.getLogger("flax_vlm")


Root: TypeAlias = Literal[True] | str | Path


def native_copy(folder: Path, name: str | Path, root: Root, *, hidden: bool | None = None) -> Path:
    """Where the copy of `folder` is, which is converted unless it is there; `folder` itself where that is native.

    A copy belongs to the files as they are, and to this version of the library: other ones get another. Of several
    processes one converts, and the others wait for it.

    Args:
      name: what a person calls the checkpoint.
      root: the folder of the copies; True for `flax_vlm` in the folder of the Hub's cache (HF_HOME).
      hidden: of the bar, as in `flax_vlm.progress`.

    Raises:
      ConversionError, OSError: as `convert.to_flax` does.
    """
    if checkpoint.is_native(folder):
        return folder
    target = _root(root) / f"{Path(name).name}-{_fingerprint(folder)}"
    while not checkpoint.is_native(target):
        from flax_vlm import convert

        logger.info("%s is converted once, to %s", name, target)
        try:
            with conversion_bar(f"{Path(name).name}, converted once", hidden) as show:
                convert.to_flax(folder, target, progress=show)
        except FileExistsError:  # another process is at it
            if target.exists() and not checkpoint.is_native(target):
                raise
            time.sleep(1)
    return target


def _root(root: Root) -> Path:
    if root is not True:
        return Path(root).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "flax_vlm"


def _fingerprint(folder: Path) -> str:
    files = sorted(file.resolve() for file in folder.iterdir() if file.is_file())
    about = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([flax_vlm.__version__, *about]).encode()).hexdigest()[:12]
