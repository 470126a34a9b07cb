"""The engine: PyTorch checkpoints to parameters and back.

Reading (torch_files), renaming and transforming (rules) and writing (checkpoint, torch_files) are three separate
things; here they meet. Nothing is guessed and nothing is initialised: every tensor is matched or dropped with a reason,
every parameter is filled once, and all faults are raised together before anything is written.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from flax_vlm import checkpoint
from flax_vlm.hub import local_folder
from flax_vlm.layers.param_tree import common_float, flatten_params, unflatten_params
from flax_vlm.layers.stack import unstack_params
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.whole_folder import Draft, remote_folder, resolved, whole_folder

from . import native_writer
from .errors import ConversionError
from .layouts import layout_for, table
from .native_writer import Outlook, write_params, written_bytes
from .provenance import describe, write_provenance
from .rules import KeyStyle, Reader, Rule, Source, match, plan_read, plan_write
from .stream import Moved, Progress, written_dtype
from .torch_files import InMemory, TorchFiles
from .torch_writer import write_tensors

logger = logging.getLogger("flax_vlm")

ModelClass = type[nn.Module]


@dataclass(frozen=True)
class Plan:
    """A checkpoint matched with a model: every parameter has its source, and every shape agrees."""

    model: nn.Module
    config: Any
    files: Reader
    sources: list[Source]
    abstract: Any  # the parameters as shapes, axis names attached

    def read(self, source: Source, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One parameter, or a slice of it."""
        return source.read(self.files, index)

    @property
    def dtype(self) -> np.dtype:
        """The floating dtype that holds all the checkpoint's."""
        return common_float(source.info.dtype for source in self.sources)


def plan(
    config: Any, files: TorchFiles | InMemory, model_class: ModelClass | None = None, architectures: Any = ()
) -> Plan:
    """Matches the tensors of `files` with the model that `config` describes, or with the part `model_class` of it.

    Raises:
      ConversionError: naming every tensor and parameter that does not fit.
    """
    model_class = model_class or registry.model_class(config, architectures)
    config = registry.config_for(model_class, config)
    rows = layout_for(model_class.__name__, files.tensors, config)
    model = registry.build(model_class, config, _filled_paths(rows, files))
    abstract = abstract_params(model)
    params = flatten_params(nn.meta.unbox(abstract))
    return Plan(model, config, files, plan_read(rows, files.tensors, params), abstract)


def open_checkpoint(folder: str | Path, model_class: ModelClass | None = None) -> Plan:
    """The plan of a PyTorch checkpoint's folder."""
    data = checkpoint.read_config(folder)
    return plan(registry.read_config(data), TorchFiles.open(folder), model_class, data.get("architectures"))


def tower(source: str | Path, name: str) -> ModelClass:
    """The class of the "text" or "vision" tower of a PyTorch checkpoint; ValueError where its model has none."""
    data = checkpoint.read_config(local_folder(source))
    return registry.tower(registry.model_class(registry.read_config(data), data.get("architectures")), name)


def outlook(source: str | Path, *, dtype: Any = None, model_class: ModelClass | None = None) -> Outlook:
    """What `to_flax` will take. Every name and shape is matched; no weights are read.

    Raises:
      ConversionError: when files and model do not fit.
    """
    planned = open_checkpoint(local_folder(source), model_class)
    return native_writer.outlook(type(planned.model).__name__, planned.sources, dtype)


def to_flax(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    model_class: ModelClass | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Moved:
    """Converts a PyTorch checkpoint, a folder or a repository on the Hub, to a native one in the folder `target`.

    Memory stays at a few blocks of 8 MiB, whatever the size of the checkpoint. `target` appears when it is whole;
    killed before, the same call goes on where it was. A target in cloud storage (gs://, with the extra `gcs`) gets its
    config.json last instead, and does not load without; a call that was killed starts afresh there.

    Args:
      dtype: cast floating tensors to it; None keeps each as it is.
      model_class: take only this part (a tower) out of the whole.
      overwrite: replace a checkpoint that is there.
      progress: called after every block, from several threads but never at the same time.

    Raises:
      ConversionError: when files and model do not fit; FileExistsError: when `target` is taken, or being written;
      OSError: when the disk has no room. Nothing is written.
    """
    folder = local_folder(source)
    _apart(folder, target)
    planned = open_checkpoint(folder, model_class)
    data = _config_json(checkpoint.read_config(folder), planned.model, dtype or planned.dtype)
    files = planned.files.files if isinstance(planned.files, TorchFiles) else []
    sizes = {file.name: file.stat().st_size for file in files}
    origin = describe(source, folder, sizes, type(planned.model).__name__, dtype)
    nbytes = sum(written_bytes(each, dtype) for each in planned.sources)
    with _draft(target, overwrite, _job(origin, data, files), nbytes) as draft:
        moved = write_params(draft, planned.sources, planned.files, dtype=dtype, progress=progress)
        write_provenance(draft.folder, origin, {each.flax: each.torch for each in planned.sources}, moved)
        _finish(draft.folder, folder, data, moved)
    return moved


def to_torch(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    key_style: KeyStyle = "v4",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Moved:
    """Converts the native checkpoint in the folder `source` to a PyTorch one (safetensors) in the folder `target`.

    It streams, appears and goes on as `to_flax` does.

    Args:
      dtype: cast floating tensors to it; None keeps each as it is.
      key_style: "v4" for the tensor names of transformers 4.x, which 5.x reads too; "v5" for its own. (The text tower
        alone is an exception: transformers 5.23 reads it under its own names only.)
      max_shard_size: bytes, or a string such as "5GB"; one file where everything fits.
      overwrite: replace a checkpoint that is there.
      progress: called after every block, from several threads but never at the same time.

    Raises:
      ValueError: for a folder that is no native checkpoint; FileExistsError: when `target` is taken, or being written;
      OSError: when the disk has no room. Nothing is written.
    """
    folder = local_folder(source)
    if not checkpoint.is_native(folder):
        raise ConversionError(f"{source}: expected a native checkpoint (a folder with {checkpoint.PARAMS}/ in it)")
    _apart(folder, target)
    read = checkpoint.read_config(folder)
    config = registry.read_config(read)
    model_class = registry.model_class(config, read.get("architectures"))
    arrays = checkpoint.open_params(folder)
    targets = plan_write(table(model_class.__name__, config), arrays.tensors, key_style)
    dtypes = [written_dtype(leaf.dtype, dtype) for leaf in arrays.tensors.values()]
    data = _with_dtype({**read, "architectures": [model_class.__name__]}, common_float(dtypes))
    files = sorted((folder / checkpoint.PARAMS).glob("*/zarr.json"))
    sizes = {checkpoint.PARAMS: sum(leaf.nbytes for leaf in arrays.tensors.values())}
    origin = describe(source, folder, sizes, model_class.__name__, dtype)
    job = _job(origin, data, files, key_style, str(max_shard_size))
    nbytes = sum(math.prod(leaf.shape) * to.itemsize for leaf, to in zip(arrays.tensors.values(), dtypes, strict=True))
    with whole_folder(target, overwrite, job=job, nbytes=nbytes) as draft:
        moved = write_tensors(draft, targets, arrays, dtype=dtype, max_shard_size=max_shard_size, progress=progress)
        write_provenance(draft.folder, origin, {path: each.torch for each in targets for path in each.flax}, moved)
        _finish(draft.folder, folder, data, moved)
    return moved


def state_dict(
    config: Any, tree: Mapping[str, Any], model_class: ModelClass | None = None, key_style: KeyStyle = "v4"
) -> dict[str, np.ndarray]:
    """Torch-named numpy arrays of any tree shaped like the parameters: parameters, gradients, optimiser moments.

    Layers may be stacked for a scan or not. Arrays are views where a transpose is all it takes.

    Raises:
      ConversionError: for parameters that the model does not have.
    """
    model_class = model_class or registry.model_class(config)
    params = {path: np.asarray(leaf) for path, leaf in flatten_params(unstack_params(tree)).items()}
    targets = plan_write(table(model_class.__name__, config), params, key_style)
    return {each.torch: each.build(params.__getitem__) for each in targets}


def from_state_dict(
    config: Any, state: Mapping[str, np.ndarray], model_class: ModelClass | None = None
) -> dict[str, Any]:
    """The parameters, one entry a layer, of a torch-named dictionary of numpy arrays; inverse of `state_dict`.

    Raises:
      ConversionError: naming every tensor and parameter that does not fit.
    """
    planned = plan(config, InMemory(state), model_class)
    return unflatten_params({each.flax: planned.read(each) for each in planned.sources})


def _filled_paths(rows: Any, files: TorchFiles | InMemory) -> set[str]:
    """Our paths that the checkpoint's names stand for."""
    found = (match(rows, name) for name in files.tensors)
    return {path for hit in found if hit and isinstance(hit[0], Rule) for path in hit[0].paths(hit[1])}


def _config_json(data: Mapping[str, Any], model: Any, dtype: Any) -> dict[str, Any]:
    """The config.json of a converted checkpoint: what was there, with what the model read from it put straight."""
    kept = dict(data) if data.get("model_type") == model.config.model_type else {}
    config = {**kept, **model.config.to_hf(), "architectures": [type(model).__name__]}
    return _with_dtype(config, np.dtype(dtype))


def _with_dtype(config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """`config` with the one spelling of the dtype that every release reads."""
    return {**{key: value for key, value in config.items() if key != "dtype"}, "torch_dtype": dtype.name}


def _draft(target: str | Path, overwrite: bool, job: Any, nbytes: int) -> AbstractContextManager[Draft]:
    if "://" not in str(target):
        return whole_folder(target, overwrite, job=job, nbytes=nbytes)
    from etils import epath

    return remote_folder(epath.Path(target), overwrite)


def _apart(source: Path, target: str | Path) -> None:
    """Refuses a target inside its source, which would change it, and a source inside its target."""
    if "://" in str(target):
        return
    one, other = resolved(source), resolved(target)
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ConversionError(f"{target}: expected a folder apart from {source}. Choose another target")


def _job(origin: Mapping[str, Any], data: Mapping[str, Any], files: Iterable[Path], *options: str) -> Any:
    """What a conversion depends on: a draft of another one is of no use."""
    return [dict(origin), dict(data), [file.stat().st_mtime_ns for file in files], *options]


def _finish(draft: Path, source: Path, data: Mapping[str, Any], moved: Moved) -> None:
    """What stands beside the weights; config.json last, because a folder without it is no checkpoint."""
    checkpoint.copy_processor(source, draft)
    checkpoint.write_config(draft, data)
    for path, count in moved.nonfinite.items():
        logger.warning("%s: %d of the written values are NaN or infinite", path, count)
