"""The engine: PyTorch checkpoints to parameters and back.

Reading (torch_files), renaming and transforming (rules) and writing (checkpoint, torch_files) are three separate
things; here they meet. Nothing is guessed and nothing is initialised: every tensor is matched or dropped with a reason,
every parameter is filled once, and all faults are raised together before anything is written.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flax_vlm import checkpoint
from flax_vlm.layers.param_tree import common_float, flatten_params, is_float, unflatten_params
from flax_vlm.layers.stack import unstack_params
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params

from .errors import ConversionError
from .layouts import TABLES, layout_for
from .rules import KeyStyle, Reader, Rule, Source, match, plan_read, plan_write
from .torch_files import InMemory, TorchFiles
from .torch_writer import write_torch

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
    rows = layout_for(model_class.__name__, files.tensors)
    model = registry.build(model_class, config, _filled_paths(rows, files))
    abstract = abstract_params(model)
    params = flatten_params(nn.meta.unbox(abstract))
    return Plan(model, config, files, plan_read(rows, files.tensors, params), abstract)


def open_checkpoint(folder: str | Path, model_class: ModelClass | None = None) -> Plan:
    """The plan of a PyTorch checkpoint's folder."""
    data = checkpoint.read_config(folder)
    return plan(registry.read_config(data), TorchFiles.open(folder), model_class, data.get("architectures"))


def to_flax(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    model_class: ModelClass | None = None,
    overwrite: bool = False,
) -> None:
    """Converts the PyTorch checkpoint in the folder `source` to a native one in the folder `target`.

    Args:
      dtype: cast floating tensors to it; None keeps each as it is.
      model_class: take only this part (a tower) out of the whole.
      overwrite: replace a checkpoint that is there.

    Raises:
      ConversionError: when files and model do not fit; FileExistsError: when `target` is taken. Nothing is written.
    """
    with checkpoint.whole_folder(target, overwrite) as folder:
        planned = open_checkpoint(source, model_class)
        data = _config_json(checkpoint.read_config(source), planned.model, dtype or planned.dtype)
        checkpoint.write_config(folder, data)
        checkpoint.copy_processor(source, folder)
        params = {each.flax: _cast(planned.read(each), dtype) for each in planned.sources}
        checkpoint.save_params(folder, unflatten_params(params))


def to_torch(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    key_style: KeyStyle = "v4",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> None:
    """Converts the native checkpoint in the folder `source` to a PyTorch one (safetensors) in the folder `target`.

    Args:
      dtype: cast floating tensors to it; None keeps each as it is.
      key_style: "v4" for the tensor names of transformers 4.x, which 5.x reads too; "v5" for its own. (The text tower
        alone is an exception: transformers 5.23 reads it under its own names only.)
      max_shard_size: bytes, or a string such as "5GB"; one file where everything fits.
      overwrite: replace a checkpoint that is there.

    Raises:
      ValueError: for a folder that is no native checkpoint; FileExistsError: when `target` is taken.
    """
    if not checkpoint.is_native(source):
        raise ConversionError(f"{source}: expected a native checkpoint (a folder with {checkpoint.PARAMS}/ in it)")
    data = checkpoint.read_config(source)
    model_class = registry.model_class(registry.read_config(data), data.get("architectures"))
    info = checkpoint.params_info(source)
    params = flatten_params(checkpoint.restore_params(source, info))
    with checkpoint.whole_folder(target, overwrite) as folder:
        write_checkpoint(folder, data, model_class, params, dtype, key_style, max_shard_size)
        checkpoint.copy_processor(source, folder)


def write_checkpoint(
    folder: Path,
    data: Mapping[str, Any],
    model_class: ModelClass,
    params: Mapping[str, Any],
    dtype: Any,
    key_style: KeyStyle,
    max_shard_size: str | int,
) -> None:
    """Writes weights and config.json as transformers reads them; `params` is flat, "a/b/kernel" -> array."""
    targets = plan_write(TABLES[model_class.__name__], params, key_style)

    def dtype_of(path: str) -> np.dtype:
        own = np.dtype(params[path].dtype)
        return np.dtype(dtype) if dtype is not None and is_float(own) else own

    shapes = {each.torch: jax.ShapeDtypeStruct(each.shape, dtype_of(each.flax[0])) for each in targets}
    tensors = ((each.torch, each.build(lambda path: _cast(np.asarray(params[path]), dtype))) for each in targets)
    write_torch(folder, tensors, shapes, max_shard_size)
    config = {**data, "architectures": [model_class.__name__]}
    checkpoint.write_config(folder, _with_dtype(config, common_float(map(dtype_of, params))))


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
    targets = plan_write(TABLES[model_class.__name__], params, key_style)
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


def place(
    planned: Plan, sharding: Callable[[str], jax.sharding.Sharding], dtype: Any = None
) -> Iterator[tuple[str, jax.Array]]:
    """Reads every parameter onto its devices, each device's slice straight from the file.

    Args:
      sharding: of a path "a/b/kernel".
      dtype: cast floating tensors to it.
    """
    for source in planned.sources:

        def piece(index: tuple[slice, ...] | None, source: Source = source) -> np.ndarray:
            return _cast(planned.read(source, index), dtype)

        yield source.flax, jax.make_array_from_callback(source.shape, sharding(source.flax), piece)


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


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    return array.astype(dtype) if dtype is not None and is_float(array.dtype) else array
