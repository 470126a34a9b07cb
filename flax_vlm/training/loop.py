"""The loop: batches, steps, a log and checkpoints. Killed or stopped at any moment, the same run goes on bit for bit.

A state holds all that its next step depends on, a checkpoint holds the position in the data beside it, and the log is
cut to the checkpoint that a run goes on from.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_vlm.training.checkpoints import Checkpoints
from flax_vlm.training.config import TrainConfig
from flax_vlm.training.metrics import Reporter, Sample, Work
from flax_vlm.training.step import Step, TrainState

PROFILE, CHECKPOINTS = "profile", "checkpoints"


class Batches(Protocol):
    """Rows of this process, without an end, and the position in them, which JSON can hold."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any, /) -> None: ...


def train(
    config: TrainConfig,
    state: TrainState,
    step: Step,
    batches: Batches,
    *,
    place: Callable[[Mapping[str, np.ndarray]], Any] = jax.device_put,
    sample: Callable[[TrainState], Iterable[Sample]] | None = None,
    flops: Callable[[Any], float] | None = None,
) -> TrainState:
    """Goes on from the newest checkpoint, or begins. SIGTERM lets the running step end, and leaves a checkpoint.

    Args:
      state: the one before the first step; it is used up. What is frozen does not go into checkpoints.
      step: compiled.
      place: rows of this process to a batch on the devices.
      sample: what to show every `config.sample_every` steps.
      flops: of the step on a batch, for the share of the devices' peak that it reaches.

    Returns:
      The last state; where the run was stopped, its `step` is below `config.steps`.
    """
    folder, steps = Path(config.output), config.steps
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(config.checkpoints or folder / CHECKPOINTS, config.keep))
        start = checkpoints.latest() or 0
        if start:
            state = _restore(checkpoints, start, state, batches if start < steps else None)
        reporter = stack.enter_context(Reporter(folder, start, steps, every=config.log_every))
        is_stopped = stack.enter_context(_stopped_by_signal())
        profiler = stack.enter_context(contextlib.ExitStack())
        first, last = config.profile or (0, 0)
        for number in range(start + 1, steps + 1):
            if number == first:
                profiler.enter_context(jax.profiler.trace(str(folder / PROFILE)))
            began = time.perf_counter()
            rows = next(batches)
            waited = time.perf_counter() - began
            batch = place(rows)
            work = Work(config.batch_size, _tokens(rows, config.batch_size), flops(batch) if flops else 0, waited)
            state, metrics = step(state, batch)
            reporter.add(number, metrics, work)
            if number == last:
                jax.block_until_ready(metrics)
                profiler.close()
            stop = is_stopped(number)
            if stop or number == steps or number % config.checkpoint_every == 0:
                reporter.flush()
                checkpoints.save(number, state.replace(frozen=None), batches.get_state())
            if stop:
                break
            if sample is not None and number % config.sample_every == 0:
                reporter.show(number, sample(state))
    return state


def _restore(checkpoints: Checkpoints, step: int, state: TrainState, batches: Batches | None) -> TrainState:
    """The state of a checkpoint, where `state` was; batches that are to come go on there."""
    held = state.replace(frozen=None)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), held)
    jax.tree.map(lambda leaf: leaf.delete(), held)  # there may be no room for two
    restored, position = checkpoints.restore(step, abstract)
    if batches is not None:
        if position is None:
            raise ValueError(
                f"{checkpoints.folder / str(step)} was not written by {jax.process_count()} processes, each of which "
                "reads its own part of the data: start as many as there were"
            )
        batches.set_state(position)
    return restored.replace(frozen=state.frozen)


def _tokens(rows: Mapping[str, np.ndarray], batch_size: int) -> int:
    """Of the whole batch, about; without padding."""
    mask = rows.get("attention_mask")
    return 0 if mask is None else int(np.count_nonzero(mask)) * batch_size // len(mask)


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[Callable[[int], bool]]:
    """A function: whether to stop after this step, because of a SIGTERM. All processes stop after the same one."""
    if jax.process_count() > 1:  # JAX itself watches for the signal, and agrees on a step
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield lambda _: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
