"""Checkpoints of a run: parameters, optimiser, step, key and the position in the data together.

They are written while training goes on. A step's folder gets its name when all of it is written, so that what a killed
run left half done is never chosen; the next run removes it.
"""

import json
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

_STATE, _DATA = "state", "data"


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them; `with` closes it."""

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        """Opens `folder`, on a disk or a gs:// address that all processes reach, and makes it where it is missing."""
        self.folder = epath.Path(folder).expanduser().resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = _Manager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest step that was written to its end."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Begins to write; `state` may be donated to the next step as soon as this returns.

        Waits for the checkpoint before, and raises what went wrong with it.

        Args:
          state: a pytree of arrays.
          data_state: this process's position in the data; JSON can hold it.
        """
        positions = {"processes": _of_all_processes(json.dumps(data_state))}
        items = {_STATE: ocp.args.StandardSave(state), _DATA: ocp.args.JsonSave(positions)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, Any]:
        """The state and this process's position in the data; None where another number of processes wrote them.

        Args:
          abstract: the state as shapes, dtypes and shardings; the mesh need not be that of the run that wrote it.

        Raises:
          ValueError: where the checkpoint holds something else.
        """
        items = {_STATE: ocp.args.StandardRestore(abstract), _DATA: ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:
            message = f"{self.folder / str(step)}: expected the state of this run, came another: {error}"
            raise ValueError(f"{message}. Choose another folder") from error
        positions = restored[_DATA]["processes"]
        if len(positions) != jax.process_count():
            return restored[_STATE], None
        return restored[_STATE], json.loads(positions[jax.process_index()])

    def wait(self) -> None:
        """Until all is written; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Leaves it to the loop to ask JAX whether to stop.

    JAX agrees on a step to stop after from the newest one that each process asked about. Orbax's thread asks when it
    has written a checkpoint, about the step of that one, and so took a process back: one stopped, the other waited.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _of_all_processes(text: str) -> list[str]:
    """The text of each process, on each of them."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
