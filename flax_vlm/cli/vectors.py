"""What `flax-vlm embed` makes vectors of, and the .npy array that it writes."""

import base64
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .rows import Job

if TYPE_CHECKING:
    from flax_vlm.inference.row_file import Row

BATCH_SIZE = 32


def of_images(pictures: Sequence[Path]) -> Job:
    """Pictures by their paths."""
    missing = [picture for picture in pictures if not picture.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: expected a picture file, there is none. Correct --images")
    return _job(pictures, pictures, lambda row: str(pictures[row]), "image")


def of_texts(file: Path) -> Job:
    """The lines of a file that are not empty."""
    lines = [(number, line) for number, line in enumerate(file.read_text("utf-8").splitlines(), 1) if line]
    if not lines:
        raise ValueError(f"{file}: expected a text in each line, found none")
    return _job([line for _, line in lines], [file], lambda row: f"{file}, line {lines[row][0]}", "text")


def of_records(paths: Sequence[Path], field: str) -> Job:
    """What records have under a name: pictures under "image", texts under others."""
    from flax_vlm.inference import Mapped
    from flax_vlm.training.data import records

    data_set = records.read(paths)

    def read(record: dict[str, Any]) -> Any:
        found = record.get(field)
        if found is None or (field != "image" and not isinstance(found, str)):
            what = "picture" if field == "image" else "text"
            raise ValueError(f"expected a {what} as {field!r} of a record, came {type(found).__name__}")
        return found

    return _job(Mapped(read, data_set), data_set.files, data_set.where, field)


def _job(items: Sequence[Any], files: Sequence[Path], where: Callable[[int], str], field: str) -> Job:
    import numpy as np

    from flax_vlm.inference import Bad, PictureVectors, TextVectors, unit

    def noted(_row: int, result: Any) -> bytes:
        if isinstance(result, Bad):
            return result.reason.encode()
        return base64.b64encode(unit(np.asarray(result, np.float32)).tobytes())

    return Job(
        items=items,
        files=files,
        where=where,
        depends={"field": field},
        work=PictureVectors if field == "image" else TextVectors,
        noted=noted,
        write=_array,
    )


def _array(file: IO[bytes], rows: Iterable["Row"]) -> None:
    """One vector after the other; NaN for a row of which there is none."""
    import numpy as np

    first = next((row.content for row in rows if row.good), None)
    if first is None:
        raise ValueError("expected at least one row of which a vector can be made, found none")
    width = len(base64.b64decode(first)) // 4
    nan, number = np.full(width, np.nan, "<f4").tobytes(), sum(1 for _ in rows)
    header = {"descr": "<f4", "fortran_order": False, "shape": (number, width)}
    np.lib.format.write_array_header_1_0(file, header)
    for row in rows:
        file.write(base64.b64decode(row.content) if row.good else nan)
