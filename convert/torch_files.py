"""PyTorch checkpoints on disk: safetensors or `.bin`, one file or many, read one tensor or slice at a time.

Opening reads names, shapes and dtypes only, and believes none of it: files come from strangers and over bad lines. What
cannot be read as it stands is refused, by one ConversionError, before any tensor is read. Arrays are numpy's
throughout; bfloat16 is ml_dtypes'.
"""

import json
import math
import os
import pickle
import stat
import sys
import textwrap
import threading
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from reprlib import repr as shortened
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from flax_vlm.array_files import Index, empty, plain, read_slice

from .errors import ConversionError, Faults

LAYOUTS = (  # a file of everything, or the index of its shards; the first pair that is there is read
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PICKLES = (".bin", ".pt", ".pth")
MAX_JSON = 100_000_000  # bytes of a header or an index: safetensors' own bound, which 400,000 tensors stay under

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

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TorchFiles:
    """The tensors of a checkpoint, and the `files` that hold them, their index last.

    `tensors` keeps the order of the files, so that reading in it reads them through. `read` may be called by threads.
    """

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
        self.files = [*paths, file] if indexed else paths
        load = _loading_once()
        shards = {path.name: _Pickle(path, load) if path.suffix in PICKLES else _Safetensors(path) for path in paths}

        self.tensors: dict[str, TensorInfo] = {}
        self._shard_of: dict[str, _Safetensors | _Pickle] = {}
        faults = Faults()
        for file_name, shard in shards.items():
            for name in shard.tensors:
                if not name.isprintable():
                    faults.add("tensors whose name has characters of no name; do not trust this file", repr(name))
            for name in sorted(shard.tensors.keys() & self.tensors.keys()):
                faults.add("tensors that two shards hold (expected: one); which one is stale?", f"{file_name}: {name}")
            self.tensors |= shard.tensors
            self._shard_of |= dict.fromkeys(shard.tensors, shard)
        for name, file_name in indexed.items():
            if name not in shards[file_name].tensors:
                faults.add("tensors of the index that their shard lacks; are both of one save?", f"{file_name}: {name}")
        faults.raise_any(f"{file}: expected every tensor once, under a plain name, where the index says.")

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """One tensor, or a slice of it, for reading only: it may be the mapped file itself.

        Raises:
          ConversionError: for a file that became shorter; OSError, naming the file, where the disk fails.
        """
        info, shard = self.tensors[name], self._shard_of[name]
        return shard.read(name, plain(index, info.shape))


class InMemory:
    """A state dict, read as TorchFiles reads a folder."""

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        self._state = state
        self.tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in state.items()}

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._state[name] if index is None else self._state[name][index]


def _find(path: Path) -> Path:
    """The file to begin with: the weights, or the index of their shards."""
    if not path.is_dir():
        return _regular(path)
    for pair in LAYOUTS:
        there = [path / name for name in pair if os.path.lexists(path / name)]  # broken links too, to name them
        if len(there) == 2 and set(_read_index(_regular(there[1])).values()) != {pair[0]}:
            raise ConversionError(
                f"{path}: expected {pair[0]} or {pair[1]}, came both, and the index is of other files. "
                "Which one is stale? Move it away."
            )
        if there:
            return _regular(there[-1])
    names = ", ".join(name for pair in LAYOUTS for name in pair)
    came = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "an empty folder"
    raise ConversionError(f"{path}: expected one of {names}; came {came}. Is this the folder of a PyTorch checkpoint?")


def _regular(path: Path) -> Path:
    """`path` where it is a file: to open a pipe would wait for ever, and a device is not a checkpoint."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        came = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ConversionError(f"{path}: expected a file, came {came}. Download the checkpoint again.")
    return path


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard, a file beside the index."""
    try:
        with index.open("rb") as file:
            weight_map = _parse(file.read(MAX_JSON + 1))["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("weight_map is not a table of file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f'{index}: expected JSON with "weight_map": {{tensor: shard}}, came {type(error).__name__}: {error}.'
        raise ConversionError(f"{message} {_remedy(index)}") from error
    faults = Faults()
    for shard in dict.fromkeys(weight_map.values()):
        # Judged by its name alone: the Hub's cache makes every shard a symbolic link to elsewhere, and rightly so.
        # By the rules of Windows, which also know every separator of the others.
        if PureWindowsPath(shard).name != shard:
            kind = "shards outside the folder of their index (expected: beside it); do not trust this file"
            faults.add(kind, repr(shard))
        elif not os.path.isfile(index.parent / shard):  # which says no to names that no file can have, too
            faults.add("shards that are not there (expected: files beside the index); download them", repr(shard))
    faults.raise_any(f"{index} names files that cannot be read.")
    return weight_map


def _parse(data: bytes) -> Any:
    """JSON in which no name stands twice: readers differ in which one they take."""
    if len(data) > MAX_JSON:
        raise ValueError(f"more than {MAX_JSON} bytes")
    return json.loads(data.decode(), object_pairs_hook=_table)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shortened(name)} {count} times")
    return table


class _Safetensors:
    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise ConversionError(
                f"{path}: expected a file of weights ({', '.join(('.safetensors', *PICKLES))}), came {path.name}. "
                "Give the checkpoint's folder, or one such file."
            )
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            laid_out = list(_laid_out(path, self._descriptor))
            with safe_open(path, framework="numpy"):  # its judgement of the header
                pass
        except ConversionError:
            raise
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ConversionError(f"{path}: expected a safetensors file, came: {error}. {_remedy(path)}") from error
        self.tensors = {name: info for name, info, _ in laid_out}
        self._starts = {name: start for name, _, start in laid_out}

    def read(self, name: str, index: Index) -> np.ndarray:
        info = self.tensors[name]
        array = empty([part.stop - part.start for part in index], info.dtype)
        try:
            read_slice(self._descriptor, self._starts[name], info.shape, index, array)
        except EOFError as error:
            raise ConversionError(
                f"{self._path}: {name} was expected whole, the file now ends in it. "
                "Something shortened it while it was being read; download it again."
            ) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        return array


def _laid_out(path: Path, descriptor: int) -> Iterator[tuple[str, TensorInfo, int]]:
    """Each tensor of a safetensors file and where its bytes start, in the order they lie in.

    safetensors opens a file whose header names a tensor twice, and of others it does not say which tensor is at fault.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, MAX_JSON):
        raise ValueError(f"{size} bytes that announce a header of {length}")
    header, data = _parse(os.pread(descriptor, length, 8)), 8 + length
    if not isinstance(header, dict):
        raise ValueError(f"a header that is a {type(header).__name__}")
    header.pop("__metadata__", None)

    def refused(name: str, expected: str) -> ConversionError:
        return ConversionError(f"{path}: {name}: {expected}, came {shortened(header[name])}. {_remedy(path)}")

    spans = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(spelling), "shape": [*shape], "data_offsets": [first, last]} if all(
                type(number) is int and 0 <= number <= sys.maxsize for number in (*shape, first, last)
            ):
                info = TensorInfo(tuple(shape), _known_dtype(path, name, spelling, DTYPES), path)
            case _:
                raise refused(name, "expected its dtype, shape and data_offsets")
        # numpy's own limits: an empty array has to be addressable too.
        if len(shape) > 64 or math.prod(filter(None, shape)) * info.dtype.itemsize > sys.maxsize:
            raise refused(name, "expected a shape that an array can have")
        if info.nbytes != last - first:
            raise refused(name, f"expected data_offsets {info.nbytes} bytes apart, as its shape and dtype ask for")
        spans.append((first, last, name, info))
    end = 0
    for first, last, name, info in sorted(spans, key=lambda span: span[:3]):
        if first != end:
            raise refused(name, f"expected it to start at byte {end}, where the tensor before it ends")
        yield name, info, data + first
        end = last
    if end != size - data:
        raise ValueError(f"{size - data} bytes of tensors where the header announces {end}")


class _Pickle:
    def __init__(self, path: Path, load: Callable[[Path], dict[str, Any]]) -> None:
        self._path, self._load = path, load
        self.tensors = {}
        for name, tensor in load(path).items():
            dtype = _known_dtype(path, name, str(tensor.dtype).removeprefix("torch."), BY_NAME)
            self.tensors[name] = TensorInfo(tuple(tensor.shape), dtype, path)

    def read(self, name: str, index: Index) -> np.ndarray:
        import torch

        tensor = self._load(self._path)[name].detach().resolve_neg()[index]
        if tensor.dtype == torch.bfloat16:  # torch's bridge to numpy does not know it: cross as plain bits
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _loading_once() -> Callable[[Path], dict[str, Any]]:
    """`_load_pickle` for threads, which wait for a file instead of loading it once each.

    Files of before PyTorch 1.6 cannot be mapped and are in memory whole, so no more are kept than the two neighbours
    that threads meet in.
    """
    load, lock = lru_cache(maxsize=2)(_load_pickle), threading.Lock()

    def locked(path: Path) -> dict[str, Any]:
        with lock:
            return load(path)

    return locked


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
        if is_zip:
            _check_zip(path)
        state = torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: expected tensors only, came a pickle that would run code, or is damaged; nothing of it was run. "
            "Take the checkpoint's safetensors files, or ask its author for them."
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        came = textwrap.shorten(repr(error), 200)
        raise ConversionError(f"{path}: expected a file of torch.save, came: {came}. {_remedy(path)}") from error
    entries = state.items() if isinstance(state, dict) else [("the file", state)]
    for name, value in entries:
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested
        if not dense or value.device.type != "cpu" or not isinstance(name, str) or not isinstance(state, dict):
            raise ConversionError(
                f"{path}: expected a state dict of dense tensors, came {type(value).__name__} for {shortened(name)}. "
                "Save the state dict alone: torch.save(model.state_dict(), ...)."
            )
        if value.nbytes > path.stat().st_size:  # one number, seen as a matrix of any size
            raise ConversionError(
                f"{path}: {name}: expected a tensor whose values are all in the file, came one of {value.nbytes} bytes "
                f"in {path.stat().st_size}. Save tensor.contiguous(), and do not trust a file that you did not save."
            )
    return state


def _check_zip(path: Path) -> None:
    """Refuses what torch.load would not notice: compressed entries, of any size once they are read, and flipped bits.

    Names, shapes and places are in the small entries, whose checksums are looked at; those of the tensors are not.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        announced, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if packed or announced > size:
            came = f"{packed[0]} compressed" if packed else f"{announced} bytes announced in a file of {size}"
            raise ConversionError(
                f"{path}: expected entries stored as torch.save stores them, came {came}. Do not trust this file; "
                "take the checkpoint's safetensors files."
            )
        for entry in entries:
            if "/data/" not in entry.filename and entry.CRC:  # torch.save can be told to compute none
                archive.read(entry)


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
