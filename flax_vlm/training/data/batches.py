"""The batches of a run: the same for a seed, whatever reads them, and from any step on.

Each process takes every n-th record of one shuffled order, which begins anew, in another order, when it has ended. What
stands at a position of it depends on the seed alone, so the number of workers changes nothing, and the state of a run
is the position it has reached, with those of the examples that wait in unfinished rows.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Shaped

from flax_vlm.training.data import records
from flax_vlm.training.data.examples import LAYOUTS, Example, Format, Limits
from flax_vlm.training.data.packing import Packer, Row, lay_out

logger = logging.getLogger("flax_vlm")

Batch = dict[str, Shaped[np.ndarray, "B ..."]]
State = dict[str, Any]  # JSON

# The threads of a process that read, and the examples it holds ready: few, as a picture of GLM-4V's size takes 15 MB.
_ALONE, _WORKER = (4, 16), (1, 4)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and the shape of a row of it."""

    paths: tuple[str, ...]
    """Files of records (.array_record, .parquet, .jsonl), or patterns such as data/*.parquet."""
    format: Format
    """What a record holds: see `flax_vlm.training.data.examples`."""
    max_length: int
    """Tokens of a row; what is longer is cut."""
    max_images: int = 1
    """Pictures of a row."""
    packing: bool = False
    """Put several documents into a row, as far as they fit."""
    shuffle_seed: int | None = None
    """Of the order of the records; by default the run's seed."""
    workers: int = 0
    """Processes that read for each process of the run; 0 reads with threads. They need room in /dev/shm: some thirty
    pictures each, of 0.6 MB at 224 x 224."""
    max_bad: int = 100
    """Records that each process skips, as nothing can be made of them, before it gives up."""


@dataclass(frozen=True)
class Bad:
    """A record of which nothing can be made."""

    number: int
    reason: str


class Batches(Iterator[Batch]):
    """The rows of one process, batch after batch, without an end."""

    def __init__(
        self, config: DataConfig, processor: Any, family: str, rows: int, seed: int, index: int, count: int
    ) -> None:
        """See `make_batches`; `index` of `count` processes, with so many rows each."""
        import grain

        try:
            data_set = records.read(config.paths)
        except (OSError, ValueError) as error:
            raise ValueError(f"data.paths: {error}") from error
        tokens = min(config.max_length, processor.max_text_length) if family == "altclip" else config.max_length
        self._limits = Limits(tokens, config.max_images)
        self._config, self._family, self._rows, self._number = config, family, rows, len(data_set)
        self._padding = processor.tokenizer.pad_token_id or 0
        self._picture = (
            processor.image_processor(np.zeros((1, 1, 3), np.uint8)).shape[1:] if config.max_images else (0, 0, 3)
        )
        # Processes whose batches had other shapes would run other programs, and wait for each other for ever.
        self._buckets = [2**n for n in range(config.max_images.bit_length()) if count == 1] + [config.max_images]
        order = grain.MapDataset.range(len(data_set))
        order = order.shuffle(seed=(seed if config.shuffle_seed is None else config.shuffle_seed) % 2**32).repeat()
        prepare = _Prepare(data_set, processor, family, config.format, self._limits, (seed, index))
        self._examples: Any = order[index::count].map_with_index(prepare)  # of grain: an Example or a Bad by position

        self._stream: Any = None  # its iterator, from the position on
        self._position = 0
        self._packer: Packer[int] = Packer(self._limits)
        self._bad: set[int] = set()

    def __next__(self) -> Batch:
        rows: list[list[Example]] = []
        while len(rows) < self._rows:
            position, example = self._read()
            if not self._config.packing:
                rows.append([example])
            elif row := self._packer.add(position, example):
                rows.append(row.examples)
        return self._arrays(rows)

    def get_state(self) -> State:
        """What `set_state` goes on from: behind the last batch that was given out. It can be written as JSON."""
        return {
            "records": self._number,
            "position": self._position,
            "rows": [row.names for row in self._packer.rows],
            "bad": sorted(self._bad),
        }

    def set_state(self, state: State) -> None:
        """Goes on where `get_state` was called, with any number of workers.

        Raises:
          ValueError: where there are other records than there were.
        """
        if state["records"] != self._number:
            raise ValueError(
                f"data.paths: expected {state['records']} records, as when this run was saved, found {self._number}"
            )
        self.close()
        self._position, self._bad = state["position"], set(state["bad"])
        self._packer.rows = [Row(list(names), list(map(self._again, names))) for names in state["rows"]]

    def close(self) -> None:
        """Ends the workers; the next batch starts new ones."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @property
    def skipped(self) -> int:
        """The records of which nothing could be made."""
        return len(self._bad)

    def _again(self, position: int) -> Example:
        """One that was read before."""
        example = self._examples[position]
        if isinstance(example, Bad):
            raise ValueError(f"data.paths: record {example.number} was good when this run was saved: {example.reason}")
        return example

    def _read(self) -> tuple[int, Example]:
        """The next example, and where it stands."""
        if self._stream is None:
            self._stream = self._start()
        while True:
            example = next(self._stream)
            position, self._position = self._position, self._position + 1
            if isinstance(example, Example):
                return position, example
            self._skip(example)

    def _start(self) -> Any:
        import grain
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # grain asks for flags of its own, which only programs of absl parse
        threads, ahead = _WORKER if self._config.workers else _ALONE
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        workers = grain.MultiprocessingOptions(num_workers=self._config.workers, per_worker_buffer_size=ahead)
        return iter(self._examples[self._position :].to_iter_dataset(reading).mp_prefetch(workers, _end_with_parent))

    def _skip(self, bad: Bad) -> None:
        if bad.number in self._bad:
            return
        self._bad.add(bad.number)
        logger.warning("record %d of data.paths is skipped: %s", bad.number, bad.reason)
        if len(self._bad) > self._config.max_bad or len(self._bad) == self._number:
            raise ValueError(
                f"data.max_bad: expected at most {self._config.max_bad} bad ones of {self._number} records, "
                f"came across {len(self._bad)}, the last at {bad.number}: {bad.reason}"
            )

    def _arrays(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Under the names that the models have for them."""
        most = max(sum(len(example.pixels) for example in row) for row in rows)
        images = next(bucket for bucket in self._buckets if bucket >= most)
        out = lay_out(rows, self._limits._replace(images=images), self._picture, self._padding)
        ids, segments, pixels = out["input_ids"], out["segment_ids"], out["pixels"]
        batch = {"input_ids": ids, "attention_mask": (segments != 0).astype(np.int32)}
        if self._family == "altclip":
            return batch | {"pixel_values": pixels[:, 0]}
        batch["labels"] = out["labels"]
        if self._config.packing:
            batch["segment_ids"] = segments
        if not images:
            return batch
        if self._family == "glm4v":
            return batch | {"images": pixels}
        return batch | {"pixel_values": pixels, "image_attention_mask": out["image_mask"]}


def make_batches(
    config: DataConfig,
    processor: Any,
    family: str,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches for a model of a family ("altclip", "glm4v", "idefics"), as numpy arrays of one process's rows.

    The names are those of the model's arguments: `input_ids`, `attention_mask` and `labels` [B, T]; with packing
    `segment_ids` [B, T]; `pixel_values` (IDEFICS) or `images` (GLM-4V) [B, I, H, W, 3]; `image_attention_mask`
    [B, T, I]. AltCLIP takes `pixel_values` [B, H, W, 3] and no labels. T is `max_length`. I is the number of pictures
    of the row that has most, rounded up to a power of two and never above `max_images`; where there are several
    processes it is `max_images`, as all need one shape.

    Args:
      batch_size: rows of a batch, of all processes together.
      seed: of the order (unless `shuffle_seed` is given) and of the texts that are drawn.

    Raises:
      ValueError: for a config that cannot be, naming the field, before anything is read.
    """
    records.needed("grain")
    _check(config, processor, family, batch_size, process_count)
    return Batches(config, processor, family, batch_size // process_count, seed, process_index, process_count)


def _check(config: DataConfig, processor: Any, family: str, batch_size: int, process_count: int) -> None:
    """Raises ValueError, naming every field that cannot be."""
    if family not in LAYOUTS:
        raise ValueError(f"family: expected one of {', '.join(LAYOUTS)}, got {family!r}")
    least = {"paths": 1, "max_length": 2, "max_images": int(config.format == "pairs"), "workers": 0, "max_bad": 0}
    sizes = vars(config) | {"paths": len(config.paths)}
    faults = [
        f"data.{name} is {sizes[name]}: expected {at_least} or more"
        for name, at_least in least.items()
        if sizes[name] < at_least
    ]
    if config.format not in get_args(Format):
        faults.append(f"data.format is {config.format!r}: expected one of {', '.join(get_args(Format))}")
    if config.max_images and processor.image_processor is None:
        faults.append(f"data.max_images is {config.max_images}: expected 0 for a model of text")
    if family == "altclip" and (config.format != "pairs" or config.packing):
        faults.append(
            f"data.format is {config.format!r}, data.packing {config.packing}: expected pairs, one a row, for AltCLIP"
        )
    if batch_size < 1 or batch_size % process_count:
        faults.append(f"batch_size is {batch_size}: expected a multiple of the {process_count} processes")
    if faults:
        raise ValueError("; ".join(faults))


def _end_with_parent(_worker: int, _workers: int) -> None:
    """Called in each worker: grain's outlive a run that is killed, with their memory and what is in /dev/shm."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass(frozen=True)
class _Prepare:
    """From a position in the order and the record that stands there to an example; it pickles, for the workers."""

    data_set: records.DataSet
    processor: Any
    family: str
    form: Format
    limits: Limits
    seeds: tuple[int, int]

    def __call__(self, position: int, number: int) -> Example | Bad:
        try:
            rng = np.random.default_rng([*self.seeds, position])
            return LAYOUTS[self.family](self.processor, self.data_set[number], self.form, self.limits, rng)
        # What damaged files make their readers raise has no end. None of it is lost: it is counted, and told.
        except Exception as error:
            return Bad(number, f"{type(error).__name__}: {error}")
