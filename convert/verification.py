"""Whether two checkpoints hold the same: every parameter, by value; or one checkpoint, by the hashes it came with.

Both are streamed, a block at a time on a few threads, so that memory does not grow with the checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from flax_vlm import checkpoint
from flax_vlm.array_files import BLOCK
from flax_vlm.layers.param_tree import common_float, is_float
from flax_vlm.models import registry

from . import port
from .errors import ConversionError
from .forward import TOLERANCE, compare_outputs, require_transformers
from .inspection import listed
from .layouts import table
from .provenance import read_provenance
from .rules import Axes, plan_write
from .stream import WORKERS, Content, Progress, cast, packed, row_blocks
from .torch_files import Index

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Difference:
    """How one parameter differs.

    Attributes:
      count: how many of its `size` values do.
      index: of the first that does, in our layout.
      source, target: the two values there; the source's after the cast to the target's dtype.
      largest: absolute difference of any two values, NaN where no two can be subtracted.
    """

    count: int
    size: int
    index: tuple[int, ...]
    source: str
    target: str
    largest: float

    def __str__(self) -> str:
        where = f"first {list(self.index)}: {self.source} and {self.target}"
        return f"{self.count:,} of {self.size:,} values, {where}; largest difference {self.largest:.3g}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
      target: the other checkpoint, or the conversion.json whose hashes `source` was compared with.
      parameters, nbytes: how many were compared, and their size in the target.
      cast: how many of them were cast to the target's dtype first.
      values: parameters of which values differ.
      unlike: parameters of other shape, dtype or hash, and how.
      only_source, only_target: parameters that the other does not have.
      outputs: of the forward pass, each with its largest difference over the RMS of the reference.
    """

    source: Path
    target: Path
    parameters: int
    nbytes: int
    cast: int = 0
    values: Mapping[str, Difference] = field(default_factory=dict)
    unlike: Mapping[str, str] = field(default_factory=dict)
    only_source: list[str] = field(default_factory=list)
    only_target: list[str] = field(default_factory=list)
    outputs: Mapping[str, float] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.values or self.unlike or self.only_source or self.only_target or self._apart)

    @property
    def _apart(self) -> list[str]:
        return [f"{name}: {apart:.1e}" for name, apart in self.outputs.items() if not apart <= TOLERANCE]

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs; as text what JSON has no number for."""
        return {
            "equal": self.equal,
            **asdict(self),
            "source": str(self.source),
            "target": str(self.target),
            "values": {path: {**asdict(each), "largest": _number(each.largest)} for path, each in self.values.items()},
            "outputs": {name: _number(apart) for name, apart in self.outputs.items()},
        }

    def report(self) -> str:
        """What differs, ten lines of each kind, or that nothing does."""
        lines = listed(
            {
                f"only in {self.source}": self.only_source,
                f"only in {self.target}": self.only_target,
                "of other shape, dtype or hash": [f"{path}: {how}" for path, how in self.unlike.items()],
                "of other values": [f"{path}: {how}" for path, how in self.values.items()],
                f"outputs more than {TOLERANCE:.0e} of their RMS apart": self._apart,
            }
        )
        casts = f", {self.cast:,} of them after the cast to the target's dtype" if self.cast else ""
        differ = len(self.values) + len(self.unlike)
        verdict = f"{differ:,} differ" if differ else "all equal, bit for bit"
        lines.append(f"{self.parameters:,} parameters ({self.nbytes:,} bytes) compared{casts}: {verdict}")
        if self.outputs:
            lines.append("outputs: " + ", ".join(f"{name} {apart:.1e}" for name, apart in self.outputs.items()))
        return "\n".join(lines)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def verify(
    source: str | Path, target: str | Path | None = None, *, forward: bool = False, progress: Report | None = None
) -> Verification:
    """Compares every parameter of two checkpoints, each a PyTorch or a native one, bit for bit.

    Where dtypes differ, the source's values are cast to the target's first, as a conversion does. A target that is a
    part of the source's model, a tower say, is compared with that part. Without a target, the hashes that a conversion
    stored with `source` are computed again.

    Args:
      forward: also run both, one of them by transformers, and compare what comes out, where all parameters have a
        counterpart.
      progress: called after every block, from several threads but never at the same time.

    Raises:
      ConversionError, ValueError, OSError: when one of them cannot be read, or does not fit its config.json.
    """
    source, target = Path(source), Path(target) if target else None
    if forward:
        require_transformers()
        if target is None or all(map(checkpoint.is_native, (source, target))):
            raise ConversionError("--forward: expected two checkpoints, of which one is PyTorch's. Leave it out.")
    if target is None:
        return _verify_hashes(source, progress)
    model_class = _model_class(target)
    ours, theirs = _open(source, model_class), _open(target, model_class)
    pairs = {path: (one, theirs.arrays[path]) for path, one in ours.arrays.items() if path in theirs.arrays}
    unlike = {path: how for path, pair in pairs.items() if (how := _unlike(*pair))}
    alike = {path: pair for path, pair in pairs.items() if path not in unlike}
    sizes = {path: other.nbytes for path, (_, other) in alike.items()}
    differences = _each(sizes, lambda path, passed: _difference(*alike[path], passed), progress)
    only_source = [path for path in ours.arrays if path not in theirs.arrays]
    only_target = [path for path in theirs.arrays if path not in ours.arrays]
    comparable = not (unlike or only_source or only_target)
    return Verification(
        source,
        target,
        parameters=len(alike),
        nbytes=sum(sizes.values()),
        cast=sum(one.dtype != other.dtype for one, other in alike.values()),
        values={path: difference for path, difference in differences.items() if difference},
        unlike=unlike,
        only_source=only_source,
        only_target=only_target,
        outputs=_outputs(ours, theirs) if forward and comparable else {},
    )


def _verify_hashes(folder: Path, progress: Report | None) -> Verification:
    provenance = read_provenance(folder)
    if provenance is None:
        raise ConversionError(
            f"{folder}: expected a conversion.json with the hashes of its parameters, came none. Name the checkpoint "
            "that it was converted from, to be compared with."
        )
    recorded = {path: each["sha256"] for path, each in provenance["parameters"].items()}
    arrays = _open(folder, _model_class(folder)).arrays
    sizes = {path: array.nbytes for path, array in arrays.items() if path in recorded}
    found = _each(sizes, lambda path, passed: _sha256(arrays[path], passed), progress)
    return Verification(
        folder,
        folder / checkpoint.CONVERSION,
        parameters=len(sizes),
        nbytes=sum(sizes.values()),
        unlike={
            path: f"its SHA-256 is {sha256}, {recorded[path]} was expected"
            for path, sha256 in found.items()
            if sha256 != recorded[path]
        },
        only_source=[path for path in arrays if path not in recorded],
        only_target=[path for path in recorded if path not in arrays],
    )


@dataclass(frozen=True)
class _Array:
    """One parameter of a checkpoint that is open."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]  # what is read at once, at least
    transform: Axes
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Opened(NamedTuple):
    """A checkpoint of either kind, read as parameters of one model."""

    folder: Path
    native: bool
    model: nn.Module
    part: str  # where in the model of its config.json this one stands: "text_model/"
    arrays: dict[str, _Array]


def _model_class(folder: Path) -> type[nn.Module]:
    """The model that a folder's config.json names."""
    data = checkpoint.read_config(folder)
    return registry.model_class(registry.read_config(data), data.get("architectures"))


def _open(folder: Path, model_class: type[nn.Module]) -> _Opened:
    whole = _model_class(folder)
    place = registry.place_in(model_class, whole)
    if place is None:
        raise ConversionError(
            f"{folder}: expected a {model_class.__name__}, or what contains one; a {whole.__name__} came."
        )
    if not checkpoint.is_native(folder):
        plan = port.open_checkpoint(folder, model_class)
        arrays = {
            each.flax: _Array(
                each.shape, each.info.dtype, (1,) * len(each.shape), each.transform, partial(plan.read, each)
            )
            for each in plan.sources
        }
        return _Opened(folder, False, plan.model, place.prefix, arrays)

    files = checkpoint.open_params(folder)
    held = place.inside(files.tensors)
    config = registry.config_for(model_class, registry.read_config(checkpoint.read_config(folder)))
    targets = plan_write(table(model_class.__name__, config), held)
    transforms = {path: target.transform for target in targets for path in target.flax}
    arrays = {
        path: _Array(info.shape, info.dtype, info.chunks, transforms[path], partial(files.read, place.prefix + path))
        for path, info in held.items()
    }
    return _Opened(folder, True, registry.build(model_class, config, held), place.prefix, arrays)


def _outputs(source: _Opened, target: _Opened) -> dict[str, float]:
    """What the two models make of one input, both in the target's dtype."""
    if source.native and target.native:
        raise ConversionError(
            "--forward: expected a PyTorch checkpoint on one side, came two native ones. Leave it out."
        )
    theirs, ours = (target, source) if source.native else (source, target)
    dtype = common_float(array.dtype for array in target.arrays.values())
    everything = {path: (slice(None),) * len(array.shape) for path, array in ours.arrays.items()}
    params = {path: cast(array.read(everything[path]), dtype) for path, array in ours.arrays.items()}
    named = checkpoint.read_config(theirs.folder).get("architectures") or ()
    names = [*named, _model_class(theirs.folder).__name__]
    return compare_outputs(ours.model, params, theirs.folder, names, theirs.part, dtype)


def _unlike(source: _Array, target: _Array) -> str:
    """Why two parameters cannot be compared by value; empty where they can."""
    if source.shape != target.shape:
        return f"shape {source.shape} and {target.shape}"
    if source.dtype != target.dtype and not (is_float(source.dtype) and is_float(target.dtype)):
        return f"{source.dtype} and {target.dtype}"
    return ""


def _each(
    sizes: Mapping[str, int],
    work: Callable[[str, Callable[[int], None]], Any],
    progress: Report | None,
) -> dict[str, Any]:
    """The result of `work` for each path, on threads; it is given what to call with the bytes of each block."""
    total, done, lock = sum(sizes.values()), 0, Lock()

    def run(path: str) -> Any:
        def passed(nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                if progress:
                    progress(Progress(done, total, path))

        return work(path, passed)

    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {path: pool.submit(run, path) for path in sizes}
        try:
            return {path: future.result() for path, future in futures.items()}
        finally:
            pool.shutdown(cancel_futures=True)  # what has not begun need not, after an error or an interrupt


def _blocks(*arrays: _Array) -> Iterator[Index]:
    """Slices of a parameter, in PyTorch's order, that are of whole chunks and hold BLOCK bytes or one row of chunks."""
    shape, dtype, transform = arrays[0].shape, arrays[0].dtype, arrays[0].transform
    axis = transform.slowest_axis(len(shape))
    if axis is None:
        yield ()
        return
    row = math.prod(shape) // max(1, shape[axis]) * dtype.itemsize
    chunk = max(array.chunks[axis] for array in arrays)
    for rows in row_blocks(shape[axis], chunk * max(1, BLOCK // max(1, row * chunk))):
        yield tuple(rows if each == axis else slice(None) for each in range(len(shape)))


def _difference(source: _Array, target: _Array, passed: Callable[[int], None]) -> Difference | None:
    count, first, largest = 0, None, math.nan
    for index in _blocks(source, target):
        with np.errstate(over="ignore", invalid="ignore"):  # the cast may overflow, as it did in a conversion
            one = cast(source.read(index), target.dtype)
        other = target.read(index)
        if not _same_bits(one, other, target.transform):
            unequal = _bits(one) != _bits(other)
            count += int(np.count_nonzero(unequal))
            place = tuple(map(int, np.unravel_index(int(unequal.argmax()), other.shape)))
            position = tuple((part.start or 0) + at for part, at in zip(index, place, strict=True))
            found = (position, *_told(one[place], other[place]))
            first = min(first, found) if first else found
            with np.errstate(invalid="ignore"):
                apart = np.abs(one[unequal].astype(np.float64) - other[unequal].astype(np.float64))
            largest = float(np.fmax(largest, np.fmax.reduce(apart)))  # NaN only where nothing else is
        passed(other.nbytes)
    return Difference(count, math.prod(target.shape), *first, largest) if first else None


def _same_bits(one: np.ndarray, other: np.ndarray, transform: Axes) -> bool:
    if not (one.flags.c_contiguous and other.flags.c_contiguous):
        # The layout of the side that is read as a transposed view; comparing across strides is several times slower.
        one, other = (packed(transform.to_torch(each)) for each in (one, other))
    return np.array_equal(_bits(one), _bits(other))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def _told(one: np.generic, other: np.generic) -> tuple[str, str]:
    """Two values that differ, in hexadecimal where they read alike: NaNs of other bits."""
    if str(one) != str(other):
        return str(one), str(other)
    first, second = (f"{each!s} (0x{each.tobytes()[::-1].hex()})" for each in (one, other))
    return first, second


def _sha256(array: _Array, passed: Callable[[int], None]) -> str:
    content = Content()
    for index in _blocks(array):
        block = packed(array.transform.to_torch(array.read(index)))
        content.add(block)
        passed(block.nbytes)
    return content.note()["sha256"]
