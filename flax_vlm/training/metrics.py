"""What a person watches: the log of losses, a line of progress, TensorBoard, and how well the devices are used.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) is the floating-point operations of a step's matrix
products, forward and backward, over what the devices could do at their bfloat16 peak in the time that the step took.
They are counted in the program that is differentiated, without what remat computes again: what is frozen costs less,
attention and image towers count as they are.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_vlm.parallel.roofline import CHIPS

LOG, BOARD = "log.jsonl", "tensorboard"

# Dense bfloat16 FLOP/s by the beginning of `device_kind`; those of GPUs are from NVIDIA's data sheets.
PEAKS = {kind: chip.flops for kind, chip in CHIPS.items()} | {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Of one device; None where it is not known, as for CPUs."""
    found = [kind for kind in PEAKS if device_kind.startswith(kind)]
    return PEAKS[max(found, key=len)] if found else None


def count_flops(program: Any) -> int:
    """Of the matrix products and convolutions in `jax.make_jaxpr(f)(...)`, each as often as its loop runs it."""
    total = 0
    for equation in getattr(program, "jaxpr", program).eqns:
        name, params = equation.primitive.name, equation.params
        shapes: list[Any] = [getattr(variable.aval, "shape", ()) for variable in (*equation.invars, *equation.outvars)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "conv_general_dilated":
            numbers, groups = params["dimension_numbers"], params["batch_group_count"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) // shapes[1][numbers.rhs_spec[0]] // groups
        else:
            inner = [count_flops(each) for each in _programs(params.values())]
            total += max(inner, default=0) if name == "cond" else sum(inner) * params.get("length", 1)
    return total


def _programs(values: Any) -> list[Any]:
    """The programs among the parameters of an operation: bodies of loops, of calls, of branches."""
    found = []
    for value in values:
        if hasattr(getattr(value, "jaxpr", value), "eqns"):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _programs(value)
    return found


def kept_bytes(function: Any, params: Any, *others: Any) -> int:
    """Bytes of what `function(params, *others)` keeps for its gradient by `params`, but for what goes in.

    Everything is given as shapes, and counted whole, wherever it will be.
    """

    def residuals(params: Any, *others: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: function(params, *others), params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, *others).jaxpr
    given = set(map(id, jaxpr.invars))
    kept = {id(variable): variable.aval for variable in jaxpr.outvars if id(variable) not in given}
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in kept.values())


class Sample(NamedTuple):
    """What a model answered, and the pictures [H, W, 3] that it looked at."""

    text: str
    images: Sequence[np.ndarray]


class Work(NamedTuple):
    """What a step had to do, on all devices, and the seconds that it had to wait for the data."""

    rows: int
    tokens: int
    flops: float
    waited: float


class Reporter:
    """Tells of a run in its folder and on the screen; `with` closes it. Only the first of many processes does so.

    log.jsonl has one line a step. It holds what depends on the config alone, and no times, so that a run that was
    killed and went on writes the same file as one that was not.
    """

    def __init__(self, folder: Path, step: int, steps: int, *, every: int) -> None:
        """Goes on after `step`; what was told of later ones is forgotten.

        Args:
          every: steps from one line on the screen, and one point in TensorBoard, to the next.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(f"training writes for TensorBoard: {error}. pip install flax-vlm[train]") from error
        self._steps, self._every = steps, every
        self._quiet = jax.process_index() > 0
        self._peak = (peak_flops(jax.devices()[0].device_kind) or math.inf) * jax.device_count()
        self._last: tuple[int, Any] | None = None
        self._begin()
        if not self._quiet:
            folder.mkdir(parents=True, exist_ok=True)
            cut_log(folder / LOG, step)
            self._log = (folder / LOG).open(
                "a", encoding="utf-8", buffering=1
            )  # a line is there as soon as it is known
            self._board = SummaryWriter(str(folder / BOARD), purge_step=step + 1)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.flush()
        if not self._quiet:
            self._log.close()
            self._board.close()

    def add(self, step: int, metrics: Any, work: Work) -> None:
        """Takes the metrics, a NamedTuple, of a step that is running, and tells of the one before."""
        self._tell()
        self._last = step, metrics
        self._done += work

    def flush(self) -> None:
        """Tells of all steps, and puts the log on the disk: before a checkpoint, which it must not stay behind."""
        self._tell()
        if not self._quiet:
            os.fsync(self._log.fileno())

    def show(self, step: int, samples: Iterable[Sample]) -> None:
        """Puts samples on the board."""
        for number, sample in enumerate(samples):
            if not self._quiet:
                self._board.add_text(f"sample/{number}", sample.text, step)
                for i, image in enumerate(sample.images):
                    self._board.add_image(f"sample/{number}/{i}", image, step, dataformats="HWC")

    def _begin(self) -> None:
        self._start, self._done = time.perf_counter(), np.zeros(len(Work._fields))

    def _tell(self) -> None:
        if self._last is None:
            return
        (step, metrics), self._last = self._last, None
        values = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
        if not self._quiet:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._log.write(json.dumps({"step": step, **finite}) + "\n")
        if step % self._every == 0 or step == self._steps:
            values |= self._speed()
            if not self._quiet:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
                print(_line(step, self._steps, values), flush=True)

    def _speed(self) -> dict[str, float]:
        """Since it was last asked."""
        rows, tokens, flops, waited = (self._done / (time.perf_counter() - self._start)).tolist()
        values = {"rows_per_second": rows, "tokens_per_second": tokens, "data_wait": waited}
        if flops:
            values["mfu"] = flops / self._peak
        self._begin()
        return values


def cut_log(file: Path, step: int) -> None:
    """Takes what comes after the line of `step` out of a log, if there is one."""
    file.touch()
    with file.open("r+b") as stream:
        keep = 0
        for line in stream:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:  # a kill may have cut the last one
                break
            keep += len(line)
        stream.truncate(keep)


def _line(step: int, steps: int, values: Mapping[str, float]) -> str:
    words = [f"step {step:,}/{steps:,}", f"loss {values['loss']:.4f}", f"{values['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in values:
        words.append(f"MFU {values['mfu']:.1%}")
    words.append(f"data wait {values['data_wait']:.0%}")
    if values["skipped"]:
        words.append(f"{values['skipped']:,.0f} skipped")
    return "   ".join(words)
