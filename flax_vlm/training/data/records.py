"""Records of a data set on disk: dicts, read in any order.

    .array_record  written by `write`: one dict a record, as msgpack; the one to train from, as any record is near
    .parquet       one dict a row; a row group is read at once, so shuffled reading wants small ones
    .jsonl         one dict a line

Several files are one data set, in the order of their names. Pictures are found under the keys "image" and "images", at
any depth: the bytes of a picture file, or its path, which is taken from the folder of the file of records. Files of the
Hub hold {"bytes": ..., "path": ...}.
"""

import bisect
import glob
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Record = dict[str, Any]

ENDING = ".array_record"
_PICTURES = ("image", "images")


class Records(Protocol):
    """The records of one file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def read(paths: str | Path | Sequence[str | Path]) -> "DataSet":
    """The records of files, which may be named by patterns such as "data/*.parquet".

    Raises:
      FileNotFoundError: for a path without a file.
      ValueError: for files of other kinds, and for a data set without a record.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    files = [file for path in given for file in _files(path)]
    data_set = DataSet(files)
    if not len(data_set):
        raise ValueError(f"{', '.join(map(str, given))}: expected records, found none. Is this the right path?")
    return data_set


class DataSet(Sequence[Record]):
    """The records of several files, one after the other. It pickles, and threads may share it."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._parts = [_open(file) for file in files]
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        part, number = self._place(index)
        record = self._parts[part][number]
        if not isinstance(record, dict):
            raise ValueError(f"record {index} of {self._files[part]}: expected a dict, got {type(record).__name__}")
        return _located(record, self._files[part].parent)

    @property
    def files(self) -> Sequence[Path]:
        return self._files

    def where(self, index: int) -> str:
        """Where a person finds a record: "in.jsonl, line 7", or of other kinds "in.parquet, record 6", from 0."""
        part, number = self._place(index)
        lines = self._parts[part]
        found = f"line {lines.line(number)}" if isinstance(lines, _Lines) else f"record {number}"
        return f"{self._files[part]}, {found}"

    def _place(self, index: int) -> tuple[int, int]:
        """Which file, and which record of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index}: expected one of 0 to {len(self) - 1}")
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def write(records: Iterable[Record], target: Path) -> int:
    """Writes an ArrayRecord file, with the pictures in it, and returns the number of records.

    Until it is whole, there is no target.
    """
    needed("array_record")
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    number = 0
    # In a folder of its own, which goes whatever happens; in that of the target, for the renaming to be one step.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        writer = ArrayRecordWriter(str(draft), "group_size:1")
        try:
            for record in records:
                try:
                    writer.write(msgpack.packb(_inlined(record)))
                except TypeError as error:
                    raise ValueError(f"record {number}: expected numbers, texts and bytes: {error}") from error
                number += 1
        finally:
            writer.close()
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    return number


def needed(module: str) -> None:
    """Raises ValueError where a module of the extra `train` is not installed."""
    try:
        __import__(module)
    except ImportError as error:
        raise ValueError(f"training data needs {module}: {error}. pip install flax-vlm[train]") from error


def _files(path: str | Path) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: expected a file of records, or a pattern such as data/*.jsonl, found none")
    return found


def _open(file: Path) -> Records:
    if file.suffix not in _KINDS:
        raise ValueError(
            f"{file}: expected {', '.join(_KINDS)}. `flax-vlm records` turns the .tar files of webdataset into one."
        )
    return _KINDS[file.suffix](file)


class _ArrayRecords:
    def __init__(self, file: Path) -> None:
        needed("array_record")
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._source = ArrayRecordDataSource(str(file))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        import msgpack

        return msgpack.unpackb(self._source[index])


class _Lines:
    """Knows where each line begins; opens the file for each, which is nothing beside reading a picture."""

    def __init__(self, file: Path) -> None:
        self._file = file
        begins, numbers, at = [], [], 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    begins.append(at)
                    numbers.append(number)
                at += len(line)
        self._begins, self._numbers = np.array(begins, np.int64), np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Record:
        with self._file.open("rb") as lines:
            lines.seek(self._begins[index])
            return json.loads(lines.readline().rstrip())  # else an error would tell of the next line

    def line(self, index: int) -> int:
        """The number of its line, from 1."""
        return int(self._numbers[index])


class _Rows:
    def __init__(self, file: Path) -> None:
        needed("pyarrow")
        from pyarrow import parquet

        metadata = parquet.read_metadata(file)
        self._file = file
        self._ends = list(
            itertools.accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        group = bisect.bisect_right(self._ends, index)
        with _READING:  # threads that miss the same group wait for one of them to read it
            table = _row_group(self._file, group)
        return table.slice(index - (self._ends[group - 1] if group else 0), 1).to_pylist()[0]


_KINDS = {ENDING: _ArrayRecords, ".parquet": _Rows, ".jsonl": _Lines}
_READING = threading.Lock()


@lru_cache(maxsize=4)
def _row_group(file: Path, group: int) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(file).read_row_group(group)


def _located(value: Any, folder: Path, picture: bool = False) -> Any:
    """A record whose pictures are bytes or paths that lead to a file."""
    match value:
        case {"bytes": bytes(data)} if picture:
            return data
        case {"path": str(path)} | str(path) if picture:
            return folder / path
        case dict():
            return {key: _located(each, folder, key in _PICTURES) for key, each in value.items()}
        case list():
            return [_located(each, folder, picture) for each in value]
    return value


def without_pictures(value: Any) -> Any:
    """What of a record can be written as JSON beside what a model says to it: no pictures, and no other bytes."""
    match value:
        case dict():
            kept = {key: each for key, each in value.items() if key not in _PICTURES and not isinstance(each, bytes)}
            return {key: without_pictures(each) for key, each in kept.items()}
        case list():
            return [without_pictures(each) for each in value]
    return value


def _inlined(value: Any) -> Any:
    """A record with the bytes of its pictures instead of paths."""
    match value:
        case Path():
            return value.read_bytes()
        case dict():
            return {key: _inlined(each) for key, each in value.items()}
        case list():
            return [_inlined(each) for each in value]
    return value
