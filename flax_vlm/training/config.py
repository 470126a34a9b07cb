"""What a run is: a frozen dataclass that a recipe fills in, the command line overrides and the run's folder keeps."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from flax_vlm.layers.stack import Remat
from flax_vlm.training.data import DataConfig
from flax_vlm.training.lora import LoraConfig
from flax_vlm.training.optimizer import OptimizerConfig

DType = Literal["bfloat16", "float32"]
ObjectiveName = Literal["auto", "softmax", "sigmoid"]
RulesName = Literal["replicated", "fsdp", "fsdp_tensor"]

KEPT = "train.json"
# What may be another when a run goes on: but for rounding, no number depends on it.
FREE = ("output", "checkpoints", "checkpoint_every", "keep", "log_every", "sample_every", "samples", "profile")
FREE += ("mesh", "rules", "remat", "distributed", "data.workers", "data.max_bad")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways each axis of the mesh goes; one of them may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1
    """Slices of a pod, which only `data` spans."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. Its folder gets log.jsonl, checkpoints, TensorBoard's files and, at the end, the model."""

    model: str
    """What to start from: a folder (PyTorch or native) or a repository on the Hub."""
    output: str
    """The run's folder. The same command goes on with a run that was stopped or killed."""
    data: DataConfig
    steps: int
    batch_size: int
    """Rows of one step, on all devices together."""
    accumulate: int = 1
    """In so many parts, one after the other, as if it were one."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    trainable: tuple[tuple[str, bool], ...] = ()
    """(pattern, whether it learns), the first match counts; by default as the model's config.json says."""
    lora: LoraConfig | None = None
    """Train these factors of kernels instead of the parameters."""
    ema_decay: float | None = None
    """Keep a running average of the parameters, and give that as the trained model."""
    spike_factor: float | None = None
    """Throw away steps whose gradient is so many times longer than is usual."""
    objective: ObjectiveName = "auto"
    """Of a contrastive model: its softmax loss or SigLIP's sigmoid one. `auto` is the model's own."""
    dtype: DType = "bfloat16"
    """Of the computation, and of what does not learn; what learns is float32 at least."""
    remat: Remat = "full"
    """What the backward pass computes again rather than keep."""
    scan_layers: bool = True
    """Run the layers as a scan, which compiles in the time of one."""
    vocab_chunk: int = 8192
    """Words at a time in the loss of a language model; 0 is all."""
    contrastive_chunk: int = 0
    """Pictures at a time in a contrastive loss, a divisor of `batch_size`; 0 is all."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: RulesName = "fsdp"
    """How parameters are spread over the mesh."""
    distributed: bool = False
    """Start JAX on all processes of a job together: on TPU pods, under SLURM or Open MPI."""
    seed: int = 0
    """Of the order of the data, dropout and new parameters."""
    checkpoints: str = ""
    """Where they go instead of the run's folder: a gs:// address that all processes of a pod reach."""
    checkpoint_every: int = 1000
    keep: int = 2
    """How many checkpoints stay."""
    log_every: int = 10
    """Steps from one line of progress to the next, and from one point in TensorBoard."""
    sample_every: int = 0
    """Steps from one set of answers in TensorBoard to the next; 0 is never."""
    samples: tuple[str, ...] = ()
    """Files of records, as `data` has them, whose first are answered; by default those of `data`."""
    profile: tuple[int, int] | None = None
    """The steps (first, last) of which jax.profiler keeps a trace."""


def check(config: TrainConfig) -> None:
    """Raises ValueError, naming every field that cannot be; no device is touched."""
    faults: list[str] = []

    def expect(holds: bool, name: str, expected: str) -> None:
        if not holds:
            faults.append(f"{name} is {getattr(config, name)!r}: expected {expected}")

    expect("://" not in config.output, "output", "a folder here; `checkpoints` may be at an address")
    for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every"):
        expect(getattr(config, name) > 0, name, "a number above 0")
    for name in ("sample_every", "vocab_chunk", "contrastive_chunk"):
        expect(getattr(config, name) >= 0, name, "a number from 0 on")
    parts, chunk = config.accumulate, config.contrastive_chunk
    expect(parts < 1 or config.batch_size % parts == 0, "batch_size", f"a multiple of accumulate, which is {parts}")
    expect(chunk < 1 or config.batch_size % chunk == 0, "contrastive_chunk", f"a divisor of {config.batch_size} rows")
    expect(config.ema_decay is None or 0 < config.ema_decay < 1, "ema_decay", "a number between 0 and 1")
    expect(config.spike_factor is None or config.spike_factor > 1, "spike_factor", "a number above 1")
    expect(not (config.lora and config.trainable), "trainable", "no patterns beside lora, which trains adapters alone")
    first, last = config.profile or (1, 1)
    expect(1 <= first <= last <= config.steps, "profile", f"two steps from 1 to {config.steps}")
    for name, allowed in (("dtype", DType), ("objective", ObjectiveName), ("remat", Remat), ("rules", RulesName)):
        expect(getattr(config, name) in get_args(allowed), name, f"one of {', '.join(get_args(allowed))}")
    if faults:
        raise ValueError("; ".join(faults))


def as_json(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def keep_config(config: TrainConfig) -> None:
    """Keeps the config in the run's folder, where one that is there has to be that of the same run.

    Raises:
      ValueError: naming the fields that differ.
    """
    file = Path(config.output) / KEPT
    if file.is_file():
        try:
            old = _flat(json.loads(file.read_text("utf-8")))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}: expected the JSON of a run's config, came: {error}") from error
        new = _flat(json.loads(as_json(config)))
        differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        differing = [name for name in differing if not any(f"{name}.".startswith(f"{free}.") for free in FREE)]
        if differing:
            listed = "; ".join(f"{name} is {new.get(name)!r}, was {old.get(name)!r}" for name in differing)
            raise ValueError(f"output {config.output} is the folder of another run: {listed}. Choose another")
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".partial")
        draft.write_text(as_json(config) + "\n", "utf-8")
        draft.rename(file)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer.learning_rate": 0.1}"""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
