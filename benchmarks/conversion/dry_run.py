"""A conversion planned over a sparse checkpoint: names and shapes are those of the real one, weights there are none."""

import tempfile
import time
from pathlib import Path

from benchmarks.conversion import PYTORCH, stand_in
from benchmarks.conversion.names import Model
from benchmarks.conversion.synthetic import make_checkpoint
from benchmarks.conversion.worker import is_known
from flax_vlm.convert import native_writer, port, stream
from flax_vlm.convert.torch_files import TorchFiles


def plan(model: Model, workdir: Path) -> str:
    """What converting a model will take, as a line of text; ConversionError where a name or a shape does not fit."""
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=workdir) as name:
        folder = Path(name) / PYTORCH
        shards = make_checkpoint(folder, model, sparse=True)
        start = time.perf_counter()
        known = is_known(folder)
        sources = port.open_checkpoint(folder).sources if known else stand_in.sources(TorchFiles.open(folder).tensors)
        outlook = native_writer.outlook(model.name, sources)
        seconds = time.perf_counter() - start
    rows = "its table" if known else "stand-in rows"
    groups = -(-outlook.nbytes // stream.GROUP)
    return (
        f"{outlook}, {groups} groups; {len(model.tensors)} tensors in {len(shards)} files by {rows}, "
        f"planned in {seconds:.2f} s"
    )
