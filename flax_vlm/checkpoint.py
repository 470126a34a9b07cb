"""Native checkpoints: a folder of config.json, the processor's files, and `params/` written by Orbax.

Parameters are one nested dictionary with one entry a layer, whatever way the model runs its layers, so that anything
that reads Orbax reads them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_vlm.array_files import ArrayFiles, save_tree

PARAMS = "params"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MAX_CONFIG = 16 << 20  # bytes: a thousand times what config.json has
MAX_NESTING = 50  # brackets inside each other in it: ten times
CONVERSION = "conversion.json"  # where a converted checkpoint comes from, and the hashes of what it holds
# What a processor may need, and what a person reads; copied as they are from one format to the other.
PROCESSOR_FILES = (
    "added_tokens.json",
    GENERATION_CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def is_native(path: str | Path) -> bool:
    """Whether `path` is a folder of `save`."""
    return (Path(path) / PARAMS).is_dir()


def read_config(path: str | Path) -> dict[str, Any]:
    """The dictionary of a folder's config.json.

    Raises:
      ValueError: for a missing or damaged file.
    """
    file = Path(path) / CONFIG
    try:
        if not file.is_file():
            file.stat()  # says why, where nothing is there
            raise ValueError("a folder, a pipe or a device")
        with file.open("rb") as stream:
            text = stream.read(MAX_CONFIG + 1)
        if len(text) > MAX_CONFIG:
            raise ValueError(f"more than {MAX_CONFIG} bytes")
        data = json.loads(text.decode())
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__}")
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair can be read but not be written
        _require_shallow(data)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}). Is {path} the folder of a checkpoint?") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON of one object, came: {error}. Download it again") from error
    return data


def _require_shallow(data: dict[str, Any]) -> None:
    """Raises ValueError for JSON in which what follows (writing, comparing) could run out of stack."""
    level: list[Any] = [data]
    for _ in range(MAX_NESTING):
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"more than {MAX_NESTING} brackets inside each other")


def write_config(folder: Path, data: Mapping[str, Any], name: str = CONFIG) -> None:
    """Writes config.json, or a file like it."""
    (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_processor(source: str | Path, folder: Path) -> None:
    """Copies what a processor needs, where it is there."""
    for name in PROCESSOR_FILES:
        if (Path(source) / name).is_file():
            (folder / name).write_bytes((Path(source) / name).read_bytes())


def save_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes `params` (jax arrays, on any mesh, or numpy ones; one entry a layer) under `folder`."""
    save_tree(folder / PARAMS, params)


def open_params(path: str | Path) -> ArrayFiles:
    """The parameters of a checkpoint's folder, read when asked for."""
    return ArrayFiles.open(Path(path) / PARAMS)
