"""PyTorch checkpoints on disk: safetensors or `.bin`, one file or many, read one tensor or slice at a time.

Opening reads names, shapes and dtypes only. Writing makes safetensors shards and their index, as transformers lays them
out, and holds one tensor at a time. Arrays are numpy's throughout; bfloat16 is ml_dtypes'.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # before any bfloat16 is read: it is what teaches numpy, and so safetensors, the dtype
import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import ConversionError, Faults

Index = tuple[slice, ...]  # one slice an axis, of step 1

LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLES = (".bin", ".pt", ".pth")

DTYPES = {  # as a safetensors header spells them
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}  # as torch and numpy spell them
SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}


class Shaped(Protocol):
    """Anything with a shape and a dtype: TensorInfo, jax.ShapeDtypeStruct, an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of a tensor before any of it is read. `file` is None for a tensor in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path | None = None


class TorchFiles:
    """The tensors of a checkpoint. `tensors` keeps the order of the files, so that reading in it reads them through."""

    @classmethod
    def open(cls, path: str | Path) -> "TorchFiles":
        """Opens a checkpoint's folder, one of its files, or its index."""
        path = Path(path)
        try:
            return cls(_find(path))
        except OSError as error:
            message = f"{error.filename or path}: expected a readable checkpoint, came: {error.strerror or error}."
            raise ConversionError(f"{message} Check the path and its permissions.") from error

    def __init__(self, file: Path) -> None:
        indexed = _read_index(file) if file.suffix == ".json" else {}
        paths = [file.parent / shard for shard in dict.fromkeys(indexed.values())] or [file]
        # One pickle at a time: files of before PyTorch 1.6 cannot be mapped and are in memory whole.
        load = lru_cache(maxsize=1)(_load_pickle)
        shards = {path.name: _Pickle(path, load) if path.suffix in PICKLES else _Safetensors(path) for path in paths}

        self.tensors: dict[str, TensorInfo] = {}
        self._shard_of: dict[str, _Safetensors | _Pickle] = {}
        faults = Faults()
        for file_name, shard in shards.items():
            for name in sorted(shard.tensors.keys() & self.tensors.keys()):
                faults.add("tensors that two shards hold (expected: one); which one is stale?", f"{file_name}: {name}")
            self.tensors |= shard.tensors
            self._shard_of |= dict.fromkeys(shard.tensors, shard)
        for name, file_name in indexed.items():
            if name not in shards[file_name].tensors:
                faults.add("tensors of the index that their shard lacks; are both of one save?", f"{file_name}: {name}")
        faults.raise_any(f"{file}: the index and its shards contradict each other.")

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """One tensor, or a slice of it, for reading only: it may be the mapped file itself."""
        info, shard = self.tensors[name], self._shard_of[name]
        if index is None:
            return shard.read(name)
        # Neither format takes every slice that numpy takes (negative, past the end, empty), so give both plain ones.
        bounds = [part.indices(size) for part, size in zip(index, info.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"slices of step 1 are read, {index} was asked for; take every n-th after reading")
        if any(stop <= start for start, stop, _ in bounds):
            return np.empty([max(0, stop - start) for start, stop, _ in bounds], info.dtype)
        return shard.read(name, tuple(slice(start, stop) for start, stop, _ in bounds))


class InMemory:
    """A state dict, read as TorchFiles reads a folder."""

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        self._state = state
        self.tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in state.items()}

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._state[name] if index is None else self._state[name][index]


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for name in LAYOUTS:
        if (path / name).is_file():
            return path / name
    came = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "an empty folder"
    raise ConversionError(
        f"{path}: expected one of {', '.join(LAYOUTS)}; came {came}. Is this the folder of a PyTorch checkpoint?"
    )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard, a file beside the index."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("weight_map is not a table of file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f'{index}: expected JSON with "weight_map": {{tensor: shard}}, came: {error!r}. {_remedy(index)}'
        ) from error
    faults = Faults()
    for shard in dict.fromkeys(weight_map.values()):
        # Judged by its name alone: the Hub's cache makes every shard a symbolic link to elsewhere, and rightly so.
        if Path(shard).name != shard:
            faults.add("shards outside the folder of their index (expected: beside it); do not trust this file", shard)
        elif not (index.parent / shard).is_file():
            faults.add("shards that are not there (expected: beside the index); download them", shard)
    faults.raise_any(f"{index} names files that cannot be read.")
    return weight_map


class _Safetensors:
    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise ConversionError(
                f"{path}: expected a file of weights ({', '.join(('.safetensors', *PICKLES))}), came {path.name}. "
                "Give the checkpoint's folder, or one such file."
            )
        path.open("rb").close()  # says why a file cannot be read; safe_open calls it missing
        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ConversionError(f"{path}: expected a safetensors file, came: {error}. {_remedy(path)}") from error
        self.tensors = {}
        for name in self._file.offset_keys():
            stored = self._file.get_slice(name)
            dtype = _known_dtype(path, name, stored.get_dtype(), DTYPES)
            self.tensors[name] = TensorInfo(tuple(stored.get_shape()), dtype, path)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._file.get_tensor(name) if index is None else self._file.get_slice(name)[index]


class _Pickle:
    def __init__(self, path: Path, load: Callable[[Path], dict[str, Any]]) -> None:
        self._path, self._load = path, load
        self.tensors = {}
        for name, tensor in load(path).items():
            dtype = _known_dtype(path, name, str(tensor.dtype).removeprefix("torch."), BY_NAME)
            self.tensors[name] = TensorInfo(tuple(tensor.shape), dtype, path)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        import torch

        tensor = self._load(self._path)[name].detach()
        if index is not None:
            tensor = tensor[index]
        if tensor.dtype == torch.bfloat16:  # torch's bridge to numpy does not know it: cross as plain bits
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _load_pickle(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path}: expected PyTorch, which alone reads this format, came: {error}. "
            "pip install flax-vlm[torch], or take the checkpoint's safetensors files."
        ) from error
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # what torch.save writes since 1.6, and what can be mapped
    try:
        state = torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: expected tensors only, came a pickle that could run code while loading; nothing of it was run. "
            "Take the checkpoint's safetensors files, or ask its author for them."
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ConversionError(f"{path}: expected a file of torch.save, came: {error!r}. {_remedy(path)}") from error
    entries = state.items() if isinstance(state, dict) else [("the file", state)]
    for name, value in entries:
        tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not tensor or not isinstance(name, str) or not isinstance(state, dict):
            raise ConversionError(
                f"{path}: expected a state dict of dense tensors, came {type(value).__name__} for {name!r}. "
                "Save the state dict alone: torch.save(model.state_dict(), ...)."
            )
    return state


def _known_dtype(path: Path, name: str, spelling: str, known: Mapping[str, np.dtype]) -> np.dtype:
    if spelling not in known:
        raise ConversionError(
            f"{path}: {name} is {spelling}; one of {', '.join(known)} was expected. "
            "Is the checkpoint quantised? Convert the one it was made from."
        )
    return known[spelling]


def _remedy(path: Path) -> str:
    with path.open("rb") as file:
        pointer = file.read(24) == b"version https://git-lfs."
    return "This is a Git LFS pointer: run git lfs pull." if pointer else "Download it again."
