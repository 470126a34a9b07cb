"""The arrays of a native checkpoint: its folder `params/`, one zarr array a parameter, laid out as Orbax reads it.

Opening reads names, shapes and dtypes only; reading takes a whole array or a slice of it. Neither needs JAX. A
conversion stores arrays uncompressed, in chunks of about 8 MiB, so that it holds little more than a chunk; of these a
slice costs the rows that it touches. What Orbax wrote goes through tensorstore, which reads whole chunks. `publish` has
Orbax write what it keeps beside the arrays; what is then there restores with orbax.checkpoint.StandardCheckpointer,
onto any mesh.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401, it is what teaches numpy bfloat16
import numpy as np

BLOCK = 8 << 20  # bytes: what one step of a stream holds
CHUNK = 8 << 20  # bytes: the largest file of an array, unless one row of it is larger
PIECE = 512 << 10  # bytes: rows that stay in a core's cache while some of their columns are taken out
ALIGNED = 64  # bytes: what starts at a multiple of it, XLA takes on a CPU as it is, without a copy

Index = tuple[slice, ...]  # one slice an axis, of step 1


@dataclass(frozen=True)
class ArrayInfo:
    """What is known of an array before any of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArrayFiles:
    """The parameters of a native checkpoint, "a/b/kernel" -> array. Any checkpoint of one PyTree that Orbax wrote."""

    @classmethod
    def open(cls, folder: str | Path) -> "ArrayFiles":
        """Opens the folder that Orbax calls a checkpoint: `params/` of ours.

        Raises:
          ValueError: for a folder that is none.
        """
        return cls(Path(folder).resolve())

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            data = json.loads((folder / "_METADATA").read_bytes())
            keys = [[str(key["key"]) for key in leaf["key_metadata"]] for leaf in data["tree_metadata"].values()]
            self._ocdbt, self._zarr3 = bool(data.get("use_ocdbt", True)), bool(data.get("use_zarr3", False))
            # Orbax did not always write a chunk that holds nothing but zeros; where it did, a missing one is a fault.
            self._sparse = not data.get("store_array_data_equal_to_fill_value", False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder}: expected parameters that Orbax wrote, came: {error!r}. {_AGAIN}") from error
        self._names = {"/".join(path): ".".join(path) for path in keys}
        self._bare: set[str] = set()  # arrays whose chunks are files of their bytes alone
        self.tensors = {path: self._info(path) for path in self._names}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """One array, or a slice of it. May be called by threads.

        Raises:
          ValueError: for a damaged array; OSError, naming it, where the disk fails.
        """
        info, folder = self.tensors[path], self._folder / self._names[path]
        index = plain(index, info.shape)
        store = None if path in self._bare else self._store(path)
        with _reading(folder):
            array = empty([part.stop - part.start for part in index], info.dtype)
            if store is None:
                _read_chunks(folder, info, index, array)
            else:
                import tensorstore

                tensorstore.array(array, copy=False, write=True).write(store[index]).result()
            return array

    def _store(self, path: str) -> Any:
        import tensorstore

        name = self._names[path]
        if self._ocdbt:
            base = {"driver": "file", "path": f"{self._folder}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{self._folder / name}/"}
        driver = "zarr3" if self._zarr3 else "zarr"
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": self._sparse}
        with _reading(self._folder / name):
            return tensorstore.open(spec, open=True, read=True).result()

    def _info(self, path: str) -> ArrayInfo:
        if self._ocdbt or not self._zarr3:
            store = self._store(path)
            chunks = store.chunk_layout.read_chunk.shape or ()  # None for a scalar
            return ArrayInfo(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), tuple(chunks))
        header = self._folder / self._names[path] / "zarr.json"
        try:  # without tensorstore, for the sake of `flax-vlm inspect`
            data = json.loads(header.read_bytes())
            shape, chunks = data["shape"], data["chunk_grid"]["configuration"]["chunk_shape"]
            info = ArrayInfo(tuple(shape), np.dtype(data["data_type"]), tuple(chunks))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{header}: expected the header of an array, came: {error!r}. {_AGAIN}") from error
        plausible = all(type(size) is int and size >= 0 for size in (*shape, *chunks)) and len(shape) == len(chunks)
        if plausible and 0 not in chunks and not self._sparse:
            expected = {"zarr_format": 3, "node_type": "array", "fill_value": data.get("fill_value")}
            if data == expected | _metadata(info.shape, info.dtype, info.chunks):
                self._bare.add(path)
        return info


_AGAIN = "Convert or copy the checkpoint again."


@contextlib.contextmanager
def system_errors(array: Any) -> Iterator[None]:
    """Around calls of tensorstore, which raises ValueError for everything: what the system refused is an OSError."""
    try:
        yield
    except ValueError as error:
        if codes := re.findall(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(codes[-1]), os.strerror(int(codes[-1])), str(array)) from error
        raise


@contextlib.contextmanager
def _reading(array: Any) -> Iterator[None]:
    try:
        with system_errors(array):
            yield
    except ValueError as error:
        raise ValueError(f"{array}: cannot be read: {error}. {_AGAIN}") from error


def plain(index: Index | None, shape: tuple[int, ...]) -> Index:
    """Slices as numpy takes them (None, negative, past the end), as bounds within `shape`."""
    if index is None:
        return tuple(slice(0, size) for size in shape)
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError(f"slices of step 1 are read, {index} was asked for; take every n-th after reading")
    return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """As numpy's, but so placed that JAX on a CPU takes it over as it is, in large pages where the system has them."""
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + nbytes].view(dtype).reshape(shape)


def read_slice(file: int, start: int, shape: tuple[int, ...], index: Index, out: np.ndarray) -> None:
    """Fills `out` with a slice of an array of `shape`, which lies in row-major order from byte `start` of a file.

    What lies together in both is read in place. Of what does not, rows are read and their columns taken out: a disk
    reads whole pages anyway. Nothing is mapped: the file's pages would count as this process's memory, and a disk that
    fails or a file that became shorter would be a signal, not an error.

    Args:
      file: its descriptor, which threads may share.
      index: as `plain` makes it.

    Raises:
      EOFError: where the file ends too early; OSError, which names no file, where the disk fails.
    """
    if not out.size:
        return
    inner = index[1:]
    row = math.prod(shape[1:]) * out.itemsize
    start += index[0].start * row if index else 0
    if out.flags.c_contiguous and inner == plain(None, shape[1:]):
        _fill(file, start, out)
    elif row > PIECE:
        for at, part in enumerate(out):
            read_slice(file, start + at * row, shape[1:], inner, part)
    else:
        rows = np.empty((min(len(out), PIECE // row), *shape[1:]), out.dtype)
        for at in range(0, len(out), len(rows)):
            some = rows[: len(out) - at]
            _fill(file, start + at * row, some)
            out[at : at + len(some)] = some[:, *inner]


def _fill(file: int, start: int, out: np.ndarray) -> None:
    left = out.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(file, [left], start)
        if not count:
            raise EOFError
        left, start = left[count:], start + count


def _read_chunks(folder: Path, info: ArrayInfo, index: Index, out: np.ndarray) -> None:
    """Fills `out` with a slice of an array whose chunks, also those past its edge, are files of their bytes alone."""
    cells = [range(part.start // size, -(-part.stop // size)) for part, size in zip(index, info.chunks, strict=True)]
    for cell in itertools.product(*cells) if out.size else ():
        origin = [at * size for at, size in zip(cell, info.chunks, strict=True)]
        part = [
            slice(max(asked.start, first), min(asked.stop, first + size))
            for asked, first, size in zip(index, origin, info.chunks, strict=True)
        ]
        ours = out[(*_moved(part, [asked.start for asked in index]), ...)]
        chunk = folder.joinpath("c", *map(str, cell))
        nbytes = math.prod(info.chunks) * out.itemsize
        try:
            with chunk.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != nbytes:
                    raise EOFError
                read_slice(file.fileno(), 0, info.chunks, _moved(part, origin), ours)
        except (FileNotFoundError, IsADirectoryError, EOFError) as error:
            raise ValueError(f"{chunk} was expected to be a file of {nbytes} bytes") from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(chunk)) from error


def _moved(part: Iterable[slice], origin: Iterable[int]) -> Index:
    return tuple(slice(each.start - first, each.stop - first) for each, first in zip(part, origin, strict=True))


def chunk_shape(shape: tuple[int, ...], itemsize: int, stream_axis: int | None) -> tuple[int, ...]:
    """Chunks for an array that is written in blocks along `stream_axis`, each block whole chunks.

    Sizes are multiples of 128 where they can be: what meshes divide evenly and transposes like.
    """
    chunks = list(shape)
    if stream_axis is None or math.prod(shape) == 0:
        return tuple(max(1, size) for size in shape)
    chunks[stream_axis] = rows_within(BLOCK, shape, itemsize, stream_axis)
    while math.prod(chunks) * itemsize > CHUNK:
        others = [axis for axis in range(len(shape)) if axis != stream_axis]
        widest = max(others, key=lambda axis: chunks[axis], default=stream_axis)
        if chunks[widest] == 1:
            widest = stream_axis
        if chunks[widest] == 1:
            break
        chunks[widest] = _rounded(-(-chunks[widest] // 2), shape[widest])
    return tuple(chunks)


def rows_within(nbytes: int, shape: tuple[int, ...], itemsize: int, axis: int) -> int:
    """How many indices of `axis` fit in `nbytes`, at least one, spread evenly over the blocks that it takes."""
    row = max(1, math.prod(shape) // max(1, shape[axis])) * itemsize
    blocks = -(-shape[axis] // max(1, nbytes // row))
    return _rounded(-(-shape[axis] // max(1, blocks)), shape[axis])


def _rounded(size: int, limit: int) -> int:
    return min(limit, size if size < 128 else -(-size // 128) * 128)


def _metadata(shape: Iterable[int], dtype: np.dtype, chunks: Iterable[int]) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }


def create_array(folder: str | Path, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]) -> Any:
    """A new zarr array, as a tensorstore.TensorStore to write to; `folder` may be a gs:// address.

    What is written is with the operating system when its future is done, and on the disk after `sync_array`.
    """
    import tensorstore

    kvstore = f"{folder}/" if "://" in str(folder) else {"driver": "file", "path": f"{folder}/"}
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": _metadata(shape, dtype, chunks),
        "store_data_equal_to_fill_value": True,  # a file for every chunk: one that is missing is a fault, not zeros
    }
    context = tensorstore.Context({"file_io_sync": False})
    with system_errors(folder):
        return tensorstore.open(spec, context=context, create=True, delete_existing=True).result()


def sync_array(folder: Any) -> None:
    """Returns when all of the array is on the disk, if it is on one."""
    if "://" in str(folder):
        return
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def save_tree(params: Path, tree: Mapping[str, Any]) -> None:
    """Has Orbax write `tree` (arrays; jax ones may be on any mesh) as the checkpoint `params`."""
    import jax
    import orbax.checkpoint as ocp  # half a second that loading need not wait for

    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), tree)
    _save(params.resolve(), ocp.args.PyTreeSave(tree, save_args=in_chunks))


def publish(params: Any, paths: Iterable[str], write: Callable[[Mapping[str, Path]], None]) -> None:
    """Has Orbax make `params` a checkpoint of the arrays at `paths`, which `write` puts in place, path -> its folder.

    What `write` is called with lies in a folder of Orbax's that becomes `params` when all is written. `params` is a
    resolved path, or an etils.epath.Path of cloud storage.
    """
    import jax
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    from flax_vlm.layers.param_tree import unflatten_params

    @dataclass(frozen=True)
    class Leaf:
        path: str

    class Handler(type_handlers.TypeHandler):
        """Orbax's extension point: how leaves of one type are saved."""

        def typestr(self) -> str:
            return "jax.Array"  # what they are restored as

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            write({leaf.path: info.parent_dir / info.name for leaf, info in zip(values, infos, strict=True)})
            return []

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            raise NotImplementedError("these leaves are saved only")

        async def metadata(self, infos: Any) -> Any:
            raise NotImplementedError("these leaves are saved only")

        def memory_size(self, values: Any) -> list[tuple[int, int]]:
            return [(0, 0) for _ in values]

    registry = type_handlers.create_type_handler_registry((Leaf, Handler()), (jax.Array, type_handlers.ArrayHandler()))
    tree = unflatten_params({path: Leaf(path) for path in paths})
    _save(params, ocp.args.PyTreeSave(tree), type_handler_registry=registry)


def _save(params: Any, args: Any, **options: Any) -> None:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False, **options)
    log = logging.getLogger("absl")
    log.addFilter(_expected)
    try:
        with system_errors(params), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(params, args=args, force=True)
        if isinstance(params, Path):  # only in cloud storage does this file say something, and it holds a path of here
            (params / "commit_success.txt").unlink(missing_ok=True)
    finally:
        log.removeFilter(_expected)


def _expected(record: logging.LogRecord) -> bool:
    """Drops Orbax's warning that files of a format we do not ask for are missing, and errors that it raises as well."""
    return not any(text in str(record.msg) for text in ("Skipping merge of OCDBT", "_SignalingThread.run() raised"))
