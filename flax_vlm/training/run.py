"""From a config to a run. What it needs is made from shapes first, so that mistakes are found before a device works.

    prepared = run.prepare(config)
    state = run.run(prepared, params)
    params = run.trained(prepared, state, params_as_they_were)

`flax_vlm.fine_tuning` loads the parameters, before and after.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from flax_vlm import checkpoint, parallel
from flax_vlm.hub import local_folder
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.processing import PROCESSORS
from flax_vlm.training import lora, objective
from flax_vlm.training.config import TrainConfig, check, keep_config
from flax_vlm.training.data import Batches, make_batches
from flax_vlm.training.loop import train
from flax_vlm.training.metrics import Sample, count_flops, peak_flops
from flax_vlm.training.optimizer import Optimizer, make_optimizer
from flax_vlm.training.patterns import Patterns, exact
from flax_vlm.training.step import TrainState, compiled_step, make_step, merge, split, state_shardings

Sampler = Callable[[nn.Module, Mapping[str, Any]], Iterable[Sample]]  # of a model and its parameters


class Prepared(NamedTuple):
    """A run, all but its parameters."""

    config: TrainConfig
    model: Any  # as it computes while it is trained
    abstract: Any  # its parameters as shapes, with the names of their axes; adapters among them
    trainable: Patterns[bool]
    optimizer: Optimizer
    mesh: Mesh
    processor: Any
    batches: Batches


def prepare(config: TrainConfig) -> Prepared:
    """All of a run that needs no parameters. Its folder then keeps the config.

    Raises:
      ValueError or OSError: for what cannot be, naming the field.
    """
    check(config)
    with _field("model: "):
        folder = local_folder(config.model)
        model = _read_model(folder)
    family = registry.family(model.config.model_type).module
    if config.objective != "auto" and family != "altclip":
        raise ValueError(f"objective is {config.objective!r}: expected 'auto' for {type(model).__name__}")
    if config.sample_every and config.data.format == "documents":
        raise ValueError(f"sample_every is {config.sample_every}: expected 0 for documents, in which nothing is asked")
    if config.sample_every and not hasattr(model, "token_inputs"):
        raise ValueError(f"sample_every is {config.sample_every}: expected 0, as {type(model).__name__} says nothing")

    with _field("mesh: "):
        mesh = parallel.make_mesh(**dataclasses.asdict(config.mesh))
        index, count = parallel.process_share(mesh, config.rules)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % (ways * config.accumulate):
        raise ValueError(
            f"batch_size is {config.batch_size}: expected a multiple of {ways * config.accumulate}, as the mesh splits "
            f"it {ways} ways and accumulate {config.accumulate}"
        )
    with _field("model: "):
        processor = PROCESSORS[family].from_dir(folder)
    batches = make_batches(
        config.data,
        processor,
        family,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=index,
        process_count=count,
    )

    learnt = what_learns(config, model)
    keep_config(config)
    return Prepared(config, *learnt, mesh, processor, batches)


def what_learns(config: TrainConfig, model: Any) -> tuple[Any, Any, Patterns[bool], Optimizer]:
    """The model as it computes while it is trained, its parameters as shapes, which of them learn, and by what.

    Raises:
      ValueError: for patterns and an optimizer that do not fit.
    """
    model = model.clone(
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.promote_types(config.dtype, jnp.float32),
        scan_layers=config.scan_layers,
        remat=config.remat,
    )
    abstract, trainable = abstract_params(model), config.trainable
    if config.lora is not None:
        adapters = jax.eval_shape(partial(lora.init, config.lora), abstract, jax.random.key(0))
        model, abstract = lora.adapted(model, config.lora), merge(adapters, abstract)
        trainable = ((f".*/({lora.A}|{lora.B})", True), (".*", False))
    elif not trainable and registry.family(model.config.model_type).module == "idefics":
        from flax_vlm.models import idefics

        trainable = exact(idefics.trainable(model.config, nn.meta.unbox(abstract)))
    with _field("trainable: "):
        learning, _ = split(nn.meta.unbox(abstract), trainable)
    with _field("optimizer."):
        optimizer = make_optimizer(config.optimizer, learning, config.steps)
    return model, abstract, trainable, optimizer


def run(prepared: Prepared, params: Mapping[str, Any], sample: Sampler | None = None) -> TrainState:
    """Trains; see `loop.train`. The arrays of `params` are used up, wherever they are held.

    Args:
      sample: what to show every `config.sample_every` steps.
    """
    config, model, mesh = prepared.config, prepared.model, prepared.mesh
    placed = parallel.shardings(prepared.abstract, mesh, config.rules)
    rng = jax.random.key(config.seed)
    if config.lora is not None:
        params = merge(_new_adapters(config.lora, prepared, placed, rng), params)
    with contextlib.closing(prepared.batches), parallel.use(mesh, config.rules):
        create = partial(
            TrainState.create,
            optimizer=prepared.optimizer,
            dtype=model.dtype,
            param_dtype=model.param_dtype,
            ema=config.ema_decay is not None,
        )
        parts = split(params, prepared.trainable)
        shardings = state_shardings(jax.eval_shape(create, *parts, rng=rng), placed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # those in another dtype
            state = jax.jit(create, out_shardings=shardings, donate_argnums=(0, 1))(*parts, rng=rng)
        jax.tree.map(lambda leaf: leaf.delete(), params)  # whoever still holds them
        return train(
            config,
            state,
            compiled_step(_step(prepared, config, model), shardings),
            prepared.batches,
            place=partial(parallel.global_batch, mesh, config.rules),
            sample=None if sample is None else lambda state: sample(model, merge(state.params, state.frozen)),
            flops=_counter(prepared, state),
        )


def trained(prepared: Prepared, state: TrainState, base: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the trained model: those it began with, `base`, and in their dtypes what has been learnt."""
    learnt = state.params if state.ema is None else state.ema
    if prepared.config.lora is not None:
        return lora.merged(base, learnt, prepared.config.lora)
    old, _ = split(base, prepared.trainable)
    return merge(jax.tree.map(lambda new, old: new.astype(old.dtype), learnt, old), base)


def _read_model(folder: Path) -> Any:
    """The module of a checkpoint, whose names and shapes are matched with it."""
    if not checkpoint.is_native(folder):
        from flax_vlm.convert import port

        return port.open_checkpoint(folder).model
    data = checkpoint.read_config(folder)
    config = registry.read_config(data)
    model_class = registry.model_class(config, data.get("architectures"))
    return registry.build(model_class, config, checkpoint.open_params(folder).tensors)


def _new_adapters(config: lora.LoraConfig, prepared: Prepared, placed: Any, rng: jax.Array) -> dict[str, Any]:
    shapes = nn.meta.unbox(prepared.abstract)
    where, _ = split(placed, prepared.trainable)
    kernels = split(shapes, prepared.trainable)[1]
    return jax.jit(lambda rng: lora.init(config, kernels, rng), out_shardings=where)(jax.random.fold_in(rng, 1))


def _step(prepared: Prepared, config: TrainConfig, model: nn.Module) -> Any:
    if registry.family(model.config.model_type).module == "altclip":
        accumulate = 1  # the loss is of all pairs at once: the towers run in parts instead
        kind = "softmax" if config.objective == "auto" else config.objective
        loss = objective.contrastive(model, kind, microbatches=config.accumulate, chunk=config.contrastive_chunk)
    else:
        accumulate, loss = config.accumulate, objective.next_token(model, config.vocab_chunk)
    return make_step(
        loss,
        prepared.optimizer,
        accumulate=accumulate,
        ema_decay=config.ema_decay,
        spike_factor=config.spike_factor,
    )


def _counter(prepared: Prepared, state: TrainState) -> Callable[[Mapping[str, jax.Array]], float] | None:
    """A function: the FLOPs of the step on a batch, without what is computed twice to save memory."""
    if peak_flops(jax.devices()[0].device_kind) is None:
        return None
    config = dataclasses.replace(prepared.config, accumulate=1, vocab_chunk=0, contrastive_chunk=0)
    step = _step(prepared, config, prepared.model.clone(remat="none", attention_implementation="xla"))
    shapes = jax.eval_shape(lambda state: state, state)
    counted: dict[Any, float] = {}

    def count(batch: Mapping[str, jax.Array]) -> float:
        key = tuple((name, array.shape) for name, array in batch.items())
        if key not in counted:
            counted[key] = count_flops(jax.make_jaxpr(step)(shapes, batch))
        return counted[key]

    return count


@contextlib.contextmanager
def _field(name: str) -> Iterator[None]:
    """Mistakes inside are told with the name of the field in front."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}{error}") from error
