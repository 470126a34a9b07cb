"""A conversion planned over a sparse checkpoint: names and shapes are those of the real one, weights there are none."""

import tempfile
import time
from pathlib import Path

from benchmarks.conversion import PYTORCH, stand_in
from benchmarks.conversion.names import Model
from benchmarks.conversion.synthetic import make_checkpoint
from benchmarks.conversion.worker import is_known
from flax_vlm.array_files import chunk_shape
from flax_vlm.convert import port, stream
from flax_vlm.convert.native_writer import row_blocks
from flax_vlm.convert.rules import Source
from flax_vlm.convert.torch_files import TorchFiles

# Of one thread: the mapped rows, their copy in our layout, and two copies that are being written.
BLOCKS_HELD = 4
START = 350 << 20  # Python with JAX, Orbax and tensorstore


def plan(model: Model, workdir: Path) -> str:
    """What converting a model will take, as a line of text; ConversionError where a name or a shape does not fit."""
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=workdir) as name:
        folder = Path(name) / PYTORCH
        shards = make_checkpoint(folder, model, sparse=True)
        start = time.perf_counter()
        known = is_known(folder)
        sources = port.open_checkpoint(folder).sources if known else stand_in.sources(TorchFiles.open(folder).tensors)
        blocks = [_blocks(source) for source in sources]
        seconds = time.perf_counter() - start
    peak = START + stream.WORKERS * BLOCKS_HELD * max(size for _, size in blocks)
    return (
        f"{model.name}: {len(sources)} parameters from {len(model.tensors)} tensors, {model.nbytes:,} bytes in "
        f"{len(shards)} files, by {'its table' if known else 'stand-in rows'}; {sum(count for count, _ in blocks):,} "
        f"blocks; about {peak / 1e9:.1f} GB of memory at the peak; planned in {seconds:.2f} s"
    )


def _blocks(source: Source) -> tuple[int, int]:
    """In how many blocks a parameter is moved, and the bytes of the largest."""
    axis = source.transform.slowest_axis(len(source.shape))
    rows = 1 if axis is None else source.shape[axis]
    step = 1 if axis is None else chunk_shape(source.shape, source.info.dtype.itemsize, axis)[axis]
    nbytes = source.info.nbytes
    return len(list(row_blocks(rows, step))), nbytes * min(step, rows) // rows
