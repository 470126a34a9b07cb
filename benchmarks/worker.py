"""One contestant in its own process: `python -m benchmarks.worker MODULE TITLE CONTESTANT QUICK`.

It prepares its work, runs it once, and then for every line on stdin, holding a number of seconds and how many runs
not to count before them, runs it as often as fits into the seconds, at least once. Each answer is one line of JSON on
stdout; it ends with its stdin.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np

from benchmarks import device
from benchmarks.cases import Work, cases


def main(module: str, title: str, contestant: str, quick: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not get between the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers)

    case = next(case for case in cases(module, quick == "True") if case.title == title)
    start = time.perf_counter()
    work = case.contestants[contestant]()
    answer(prepare_seconds=time.perf_counter() - start, phases=work.phases, dtype=work.dtype)

    start = time.perf_counter()
    output = work.run()
    first_call = time.perf_counter() - start
    array = work.as_numpy(output)
    del output
    answer(first_call_seconds=first_call, shape=array.shape, finite=bool(np.isfinite(array).all()))

    for line in sys.stdin:
        seconds, uncounted = line.split()
        answer(seconds=_turn(work, float(seconds), int(uncounted)), peak_bytes=device.peak_bytes())


def _turn(work: Work, seconds: float, uncounted: int) -> list[float]:
    for _ in range(uncounted):
        work.run()
    times = []
    while not times or sum(times) + times[-1] <= seconds:
        start = time.perf_counter()
        work.run()
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main(*sys.argv[1:])
