"""Native checkpoints: a folder of config.json, the processor's files, and `params/` written by Orbax.

Parameters are one nested dictionary with one entry a layer, whatever way the model runs its layers, so that anything
that reads Orbax reads them. A folder appears whole or not at all.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from flax_vlm.layers.param_tree import flatten_params, unflatten_params

PARAMS = "params"
CONFIG = "config.json"
# What a processor may need, and what a person reads; copied as they are from one format to the other.
PROCESSOR_FILES = (
    "added_tokens.json",
    "generation_config.json",
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
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}). Is {path} the folder of a checkpoint?") from error
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, came: {error}. Download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected a JSON object, came {type(data).__name__}")
    return data


@contextlib.contextmanager
def whole_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write in that becomes `target` at the end, or vanishes if the block raises.

    Raises:
      FileExistsError: when something is there and `overwrite` is false, or it is no checkpoint of ours to replace.
    """
    target = Path(target).resolve()
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{target} exists: choose another target, or pass overwrite=True (--overwrite)")
        if not (target / CONFIG).is_file():
            raise FileExistsError(f"{target} exists and holds no {CONFIG}: only a checkpoint is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp keeps others out
        if target.exists():
            retired = draft.with_suffix(".replaced")
            os.rename(target, retired)
            os.rename(draft, target)
            shutil.rmtree(retired)
        else:
            os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_config(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes config.json."""
    (folder / CONFIG).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_processor(source: str | Path, folder: Path) -> None:
    """Copies what a processor needs, where it is there."""
    for name in PROCESSOR_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def save_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes `params` (jax or numpy arrays, one entry a layer) under `folder`."""
    import orbax.checkpoint as ocp  # half a second that loading PyTorch checkpoints need not wait for

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS).resolve(), params)


def params_info(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Path "a/b/kernel" -> shape and dtype of every parameter, without reading any."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata((Path(path) / PARAMS).resolve()).item_metadata
    leaves = flatten_params(metadata.tree)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def restore_params(path: str | Path, targets: Mapping[str, jax.ShapeDtypeStruct], prefix: str = "") -> dict[str, Any]:
    """The parameters under `prefix`, each in the dtype and sharding of its target.

    Args:
      targets: path "a/b/kernel" (without the prefix) -> shape, dtype and, optionally, sharding.
    """
    import orbax.checkpoint as ocp

    tree = unflatten_params({prefix + name: target for name, target in targets.items()})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            (Path(path) / PARAMS).resolve(),
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
            ),
        )
    for key in prefix.split("/")[:-1]:
        restored = restored[key]
    return restored
