"""A small run of training in a process of its own, which dies or is stopped when it is told to."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# A server that has everything imported, and forks for each run: a start takes no time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flax_vlm.training.loop", "tensorboardX"])

_AUDITED = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
STEPS, EVERY = 11, 3


class Done(NamedTuple):
    """What a run that was not killed says of itself."""

    step: int
    numbers: dict[str, Any]  # of the last state, by path
    moments: int  # at which it could have been killed


class Run:
    """`train` of a regression with dropout.

    It kills itself at its `kill`-th moment: a batch that is drawn, or a file of the run that is opened, made, renamed
    or removed. It sends itself SIGTERM while it draws the batch of step `stop`.
    """

    def __init__(
        self, output: Path, *, kill: int = 0, stop: int = 0, devices: int = 1, job: tuple[int, int, int] | None = None
    ) -> None:
        """`job` is (port, processes, index), of a process among several."""
        self._results, sender = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_train, args=(sender, output, kill, stop, devices, job))
        self.process.start()
        sender.close()

    def outcome(self) -> Done | None:
        """What it says; None where it was killed."""
        try:
            result = self._results.recv()
        except EOFError:
            self.process.join()
            assert self.process.exitcode == -signal.SIGKILL, f"died of itself: {self.process.exitcode}"
            return None
        self.process.join()
        assert self.process.exitcode == 0
        return result


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


class Numbers:
    """Batches that are made from their position; each process has its rows of them."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self) -> dict[str, Any]:
        import jax
        import numpy as np

        self.position += 1
        random = np.random.default_rng(self.position)
        x = random.normal(size=(8, 5)).astype(np.float32)
        x = np.split(x, jax.process_count())[jax.process_index()]
        return {"x": x, "y": x[:, :3] * 2 + 1, "attention_mask": np.ones((len(x), 2), np.int32)}

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def make_config(output: Path, **changes: Any) -> Any:
    from flax_vlm.training.config import TrainConfig
    from flax_vlm.training.data import DataConfig
    from flax_vlm.training.optimizer import OptimizerConfig

    options: dict[str, Any] = {"steps": STEPS, "batch_size": 8, "checkpoint_every": EVERY, "log_every": 4}
    data = DataConfig(paths=("numbers.jsonl",), format="pairs", max_length=4)
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.1)
    return TrainConfig(model="none", output=str(output), data=data, optimizer=optimizer, **options | changes)


def pieces(config: Any, devices: int = 1) -> dict[str, Any]:
    """The arguments of `train`, on a mesh of so many devices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from flax_vlm.training.objective import Loss
    from flax_vlm.training.optimizer import make_optimizer
    from flax_vlm.training.step import TrainState, compiled_step, make_step, state_shardings

    def objective(params: Any, batch: Any, rng: Any) -> Any:
        kept = batch["x"] * jax.random.bernoulli(rng, 0.9, batch["x"].shape)
        error = kept @ params["kernel"] + params["bias"] - batch["y"]
        return Loss((error**2).sum(), jnp.array(error.size, jnp.float32))

    params, frozen = {"kernel": jnp.full((5, 3), 0.1)}, {"bias": jnp.ones(3)}
    optimizer = make_optimizer(config.optimizer, params, config.steps)
    create = partial(TrainState.create, optimizer=optimizer, dtype=jnp.float32, ema=True)
    rng = jax.random.key(config.seed)
    mesh = jax.make_mesh((devices,), ("all",), (jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("all" if 8 % devices == 0 else None))
    by_column = NamedSharding(mesh, PartitionSpec(None, "all" if devices == 3 else None))
    placed = {"kernel": by_column, "bias": everywhere}
    shardings = state_shardings(jax.eval_shape(create, params, frozen, rng=rng), placed)
    return {
        "state": jax.jit(create, out_shardings=shardings)(params, frozen, rng=rng),
        "step": compiled_step(make_step(objective, optimizer, ema_decay=0.9), shardings),
        "batches": Numbers(),
        "place": partial(jax.tree.map, partial(jax.make_array_from_process_local_data, by_row)),
    }


def numbers(state: Any) -> dict[str, Any]:
    """All that a state holds, by path."""
    import jax
    import numpy as np

    state = state.replace(rng=jax.random.key_data(state.rng))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _train(sender: Any, output: Path, kill: int, stop: int, devices: int, job: tuple[int, int, int] | None) -> None:
    import jax

    from flax_vlm.training.loop import train

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1 if job else devices)
    if job:
        port, processes, index = job
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    count = itertools.count(1)
    last = 0

    def take() -> None:
        nonlocal last
        last = next(count)
        if last == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and str(arguments[0]).startswith(str(output)):
            take()

    class Watched(Numbers):
        def __next__(self) -> dict[str, Any]:
            take()
            if self.position + 1 == stop:
                signal.raise_signal(signal.SIGTERM)
            if job:
                time.sleep(0.3)  # real steps take long enough for processes to agree while they run
            return super().__next__()

    config = make_config(output)
    arguments = pieces(config, devices) | {"batches": Watched()}
    sys.addaudithook(watch)
    state = train(config, **arguments)
    sender.send(Done(int(state.step), numbers(state), last))
