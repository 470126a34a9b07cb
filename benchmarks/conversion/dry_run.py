"""A conversion planned over a sparse checkpoint: names and shapes are those of the real one, weights there are none."""

import tempfile
import time
from pathlib import Path

from benchmarks.conversion import PYTORCH
from benchmarks.conversion.names import Model
from benchmarks.conversion.synthetic import make_checkpoint
from flax_vlm.convert import native_writer, port, stream


def plan(model: Model, workdir: Path) -> str:
    """What converting a model will take, as a line of text; ConversionError where a name or a shape does not fit."""
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=workdir) as name:
        folder = Path(name) / PYTORCH
        shards = make_checkpoint(folder, model, sparse=True)
        start = time.perf_counter()
        sources = port.open_checkpoint(folder).sources
        outlook = native_writer.outlook(model.name, sources)
        seconds = time.perf_counter() - start
    groups = -(-outlook.nbytes // stream.GROUP)
    dropped = sorted(model.tensors.keys() - {source.torch for source in sources})
    return (
        f"{outlook}, {groups} groups; {len(model.tensors)} tensors in {len(shards)} files by its table, "
        f"which drops {', '.join(dropped) or 'none'}; planned in {seconds:.2f} s"
    )
