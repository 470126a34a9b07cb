"""conversion.json: where a converted checkpoint comes from, and the hashes of what it holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vlm import __version__
from flax_vlm.checkpoint import CONVERSION

if TYPE_CHECKING:  # which brings JAX, and reading does without
    from .stream import Moved


def describe(source: str | Path, folder: Path, files: Mapping[str, int], model: str, dtype: Any) -> dict[str, Any]:
    """Where a checkpoint will come from: `source`, in `folder`, the sizes of its `files`, and the cast asked for."""
    return {
        "flax_vlm": __version__,
        "model_class": model,
        "dtype": None if dtype is None else np.dtype(dtype).name,
        "source": {
            "folder": folder.resolve().name if Path(source).is_dir() else str(source),
            "files": dict(files),
        },
    }


def write_provenance(draft: Path, origin: Mapping[str, Any], names: Mapping[str, str], moved: "Moved") -> None:
    """Writes conversion.json.

    Args:
      origin: what `describe` gave.
      names: path of a parameter -> the tensor that holds it on PyTorch's side.
    """
    # Of each parameter's bytes as PyTorch holds them: one hash on both sides, and after any number of journeys.
    parameters = {path: {"torch": name, "sha256": moved.sha256[path]} for path, name in names.items()}
    text = json.dumps({**origin, "parameters": parameters}, indent=1, ensure_ascii=False)
    (draft / CONVERSION).write_text(f"{text}\n", encoding="utf-8")


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """The contents of conversion.json; None where there is none.

    Raises:
      ValueError: for a damaged file.
    """
    file = Path(folder) / CONVERSION
    try:
        data = json.loads(file.read_bytes())
        texts = [each[key] for each in data["parameters"].values() for key in ("torch", "sha256")]
        texts += [data["flax_vlm"], data["source"]["folder"]]
        sizes = data["source"]["files"].values()
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(size, int) for size in sizes):
            raise TypeError("not the contents of a conversion.json")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: expected what a conversion wrote, came: {error!r}. Convert again") from error
    return data
