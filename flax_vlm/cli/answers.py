"""The half of `flax-vlm generate` that answers the records of data sets, into a file of JSON lines."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import rows

if TYPE_CHECKING:
    from flax_vlm.inference.row_file import Row

BATCH_SIZE = 16


def generate(
    model: str,
    output: Path,
    template: str | None,
    options: rows.RowOptions,
    loading: Mapping[str, Any],
    how: Mapping[str, Any],
) -> None:
    """Writes a line for each record: {"index", "record" without its pictures, "answer", "tokens", "finish_reason"}.

    The finish reason is "stop" or "length", or of a bad record "error", whose "error" says what is wrong with it.

    Args:
      template: see `flax_vlm.training.data.prompts`.
      how: options of `vlm.generate`.
    """
    rows.start(options)
    from flax_vlm.chat import tokens_of_the_layout
    from flax_vlm.inference import Answers, Bad, Mapped
    from flax_vlm.training.data import records
    from flax_vlm.training.data.prompts import read_prompt

    data_set = records.read(options.dataset)

    def work(vlm: Any) -> Answers:
        return Answers(vlm, **how, **tokens_of_the_layout(vlm))

    def noted(row: int, result: Any) -> bytes:
        line: dict[str, Any] = {"index": row}
        try:
            line["record"] = records.without_pictures(data_set[row])
        except Exception:  # it is why there is no result
            line["record"] = None
        if isinstance(result, Bad):
            line |= {"answer": None, "tokens": 0, "finish_reason": "error", "error": result.reason}
        else:
            line |= {"answer": result.text, "tokens": result.tokens, "finish_reason": result.finish_reason}
        return json.dumps(line, ensure_ascii=False, default=str).encode()

    job = rows.Job(
        items=Mapped(lambda record: read_prompt(record, template), data_set),
        files=data_set.files,
        where=data_set.where,
        depends={"template": template, **how},
        work=work,
        noted=noted,
        write=_lines,
    )
    rows.work_through(model, output, job, options, BATCH_SIZE, loading)


def _lines(file: IO[bytes], found: Iterable["Row"]) -> None:
    for row in found:
        file.write(row.content + b"\n")
