"""What commands for whole data sets have in common: their options, and the way of rows through a model into a file."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

if TYPE_CHECKING:
    from flax_vlm.inference import RowFile
    from flax_vlm.inference.row_file import Row


@dataclass(frozen=True)
class RowOptions:
    """Options of commands that may take a data set."""

    dataset: tuple[Path, ...] = ()
    """Files of records (.jsonl, .parquet, .array_record), or patterns of them: see `flax-vlm train`."""
    batch_size: int | None = None
    """How many rows go through the model at once; 16, or 32 where they become vectors."""
    max_bad: int = 100
    """Rows of which nothing can be made that each process puts aside before it gives up. They keep their place."""
    overwrite: bool = False
    """Replace an output that is there, and drop what is left of another command for it."""
    distributed: bool = False
    """One of several processes, each started with the same command, as those of `flax-vlm train`; each takes its share
    of the rows, and holds the model on its own devices."""
    tensor: int = 1
    """Devices of a process that split the model among them, where it is too large for one."""


NONE = RowOptions()
Options = Annotated[RowOptions, tyro.conf.arg(name="")]  # --dataset, not --rows.dataset


@dataclass(frozen=True)
class Job:
    """Rows, and what becomes of them.

    Attributes:
      items: what goes through the model, in the order of the output.
      where: where a person finds a row.
      depends: on what the output depends besides model and rows, as JSON.
      work: the inference.Work of a model.
      noted: a result, or inference.Bad, of a row as one line.
      write: the output out of these.
    """

    items: Sequence[Any]
    files: Sequence[Path]
    where: Callable[[int], str]
    depends: Mapping[str, Any]
    work: Callable[[Any], Any]
    noted: Callable[[int, Any], bytes]
    write: Callable[[IO[bytes], Iterable["Row"]], None]


def start(options: RowOptions) -> None:
    """Before anything asks JAX for devices."""
    if options.tensor < 1 or options.max_bad < 0 or (options.batch_size is not None and options.batch_size < 1):
        raise ValueError(
            f"--batch-size {options.batch_size}, --max-bad {options.max_bad}, --tensor {options.tensor}: expected "
            "numbers above 0, or 0 for --max-bad"
        )
    if options.distributed:
        from flax_vlm import parallel

        parallel.start_processes()


def work_through(
    model: str, output: Path, job: Job, options: RowOptions, batch_size: int, loading: Mapping[str, Any]
) -> None:
    """Runs a job, or what is left of it, and says how it went.

    Args:
      loading: options of `from_pretrained`.

    Raises:
      ValueError or OSError: for what cannot be, before the model is loaded; and for more bad rows than are allowed.
    """
    import jax

    from flax_vlm import __version__, from_pretrained, inference, parallel
    from flax_vlm.hub import local_folder

    batch_size = options.batch_size or batch_size
    mesh = None
    if options.distributed or options.tensor > 1 or len(jax.local_devices()) > 1:
        mesh = parallel.make_mesh(tensor=options.tensor, devices=jax.local_devices())
    ways = 1 if mesh is None else mesh.shape["data"]
    if batch_size % ways:
        raise ValueError(f"--batch-size {batch_size}: expected a multiple of {ways}, as so many devices split a batch")
    folder = local_folder(model)
    depends = {
        **job.depends,
        "model": _state(sorted(path for path in folder.rglob("*") if path.is_file())),
        "data": _state(job.files),
        "batch_size": batch_size,
        **loading,
        "flax_vlm": __version__,
    }
    number, begin = len(job.items), time.perf_counter()
    with inference.row_file(output, depends, number, job.write, overwrite=options.overwrite) as file:
        found = int(file.done.sum())
        if found < number:
            work = job.work(from_pretrained(model, mesh=mesh, **loading))
            _Progress(job, file, options.max_bad).through(work, batch_size, ways)
    if jax.process_index() == 0:
        new, seconds = number - found, time.perf_counter() - begin
        put_aside = f", {file.bad:,} of them bad" if file.bad else ""
        print(f"{output}: {number:,} rows{put_aside}; {new:,} new ones in {seconds:.1f} s, {new / seconds:.1f} rows/s")


class _Progress:
    """This process on its way through the rows that are not done."""

    def __init__(self, job: Job, file: "RowFile", max_bad: int) -> None:
        self._job = job
        self._file = file
        self._max_bad = max_bad

    def through(self, work: Any, batch_size: int, ways: int) -> None:
        import jax

        from flax_vlm import inference

        items, index, count = self._job.items, jax.process_index(), jax.process_count()
        with self._bar("measuring", len(items), 0) as bar:
            sizes, bad = inference.measure(work, items, together=True, done=bar.update)
        self._note(bad.items())
        if self._file.bad > self._max_bad:  # not before: the processes of a job measure together
            self._give_up("in earlier runs")
        share = inference.make_plan(sizes, batch_size, ways)[index::count]
        done = [int(self._file.done[list(batch.rows)].sum()) for batch in share]
        left = [batch for batch, number in zip(share, done, strict=True) if number < len(batch.rows)]
        with self._bar(None, sum(len(batch.rows) for batch in share), sum(done)) as bar:
            for results in inference.run(work, items, left):
                bar.update(self._note(results))

    def _note(self, results: Iterable[tuple[int, Any]]) -> int:
        """Notes the rows that were not done, and says how many these are."""
        from tqdm import tqdm

        from flax_vlm.inference import Bad
        from flax_vlm.inference.row_file import Row

        rows = {row: result for row, result in results if not self._file.done[row]}
        noted = {row: self._job.noted(row, result) for row, result in rows.items()}
        self._file.note({row: Row(not isinstance(rows[row], Bad), content) for row, content in noted.items()})
        told = [f"{self._job.where(row)}: {result.reason}" for row, result in rows.items() if isinstance(result, Bad)]
        for each in told:
            tqdm.write(f"put aside: {each}", file=sys.stderr)
        if told and (self._file.bad > self._max_bad or self._file.bad == len(self._job.items)):
            self._give_up(f"the last {told[-1]}")
        return len(rows)

    def _give_up(self, where: str) -> NoReturn:
        raise ValueError(
            f"--max-bad {self._max_bad}: expected at most so many bad ones of {len(self._job.items):,} rows, came "
            f"across {self._file.bad:,}, {where}. What is done is kept: a larger --max-bad goes on, where some are good"
        )

    def _bar(self, what: str | None, total: int, done: int) -> Any:
        import jax
        from tqdm import tqdm

        hidden = None if jax.process_index() == 0 else True
        return tqdm(desc=what, total=total, initial=done, unit=" rows", leave=False, disable=hidden)


def _state(files: Iterable[Path]) -> str:
    """What says whether files are still the same."""
    states = [[str(path.resolve()), (state := path.stat()).st_size, state.st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()
