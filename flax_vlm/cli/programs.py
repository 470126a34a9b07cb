"""The programs of a model as shapes, ready to be compiled for a mesh: a step of training, a prefill, a decode loop.

Everything is as `flax-vlm train` and `VLM.generate` would have it, but for the values.

B rows   T tokens   I pictures a row
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_vlm import parallel
from flax_vlm.generation.config import GenerationConfig
from flax_vlm.generation.loop import begin, decode, prefill
from flax_vlm.generation.request import make_request
from flax_vlm.layers.partitioning import ways
from flax_vlm.layers.stack import Remat
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.parallel.rules import find_rules
from flax_vlm.training.metrics import count_flops, kept_bytes
from flax_vlm.training.objective import Objective, contrastive, next_token
from flax_vlm.training.optimizer import OptimizerConfig, make_optimizer
from flax_vlm.training.patterns import exact
from flax_vlm.training.step import TrainState, compiled_step, make_step, merge, split, state_shardings


@dataclasses.dataclass(frozen=True)
class Load:
    """What a program has to do, and how: the options of `flax-vlm plan` that have names there."""

    batch: int
    seq: int
    images: int = 1
    new_tokens: int = 128
    remat: Remat = "full"
    scan_layers: bool = True
    accumulate: int = 1
    vocab_chunk: int = 8192
    contrastive_chunk: int = 2048


class Draft(NamedTuple):
    """A program before it is compiled.

    Attributes:
      arguments: of `jitted`; shapes with shardings on the mesh, but for the static ones.
      held: bytes of arguments on each chip, by what they are.
      flops: of its matrix products and convolutions, without what is computed twice to save memory.
      tokens: that it works through.
      activations: bytes of what its forward pass keeps for its backward pass, on each chip, if rows alone are split.
    """

    jitted: Any
    arguments: tuple[Any, ...]
    held: dict[str, int]
    flops: int
    tokens: int
    activations: int = 0


def build(config: Any, architectures: Any, mode: Literal["train", "generate"], load: Load) -> nn.Module:
    """The module, as it is trained (float32, computing in bfloat16) or run (bfloat16)."""
    param_dtype = jnp.float32 if mode == "train" else jnp.bfloat16
    remat: Remat = load.remat if mode == "train" else "none"
    options = {"dtype": jnp.bfloat16, "param_dtype": param_dtype, "scan_layers": load.scan_layers, "remat": remat}
    return registry.model_class(config, architectures)(config, **options)


def inputs(model: Any, load: Load) -> dict[str, np.ndarray]:
    """A batch that the model takes: ids with the places of pictures where it wants them, and grey pictures."""
    rows, tokens, images = load.batch, load.seq, load.images
    family = registry.family(model.config.model_type).module
    vision = model.config.vision_config
    batch = {"input_ids": np.full((rows, tokens), 9, np.int32), "attention_mask": np.ones((rows, tokens), np.int32)}
    if vision is None or not images:
        return batch
    picture = np.broadcast_to(np.float32(0), (vision.image_size, vision.image_size, 3))
    if family == "altclip":
        return batch | {"pixel_values": np.broadcast_to(picture, (rows, *picture.shape))}
    pictures = np.broadcast_to(picture, (rows, images, *picture.shape))
    if family == "idefics":
        looks = np.arange(tokens)[:, None] * images // tokens == np.arange(images)  # each part of the text at its own
        seen = np.broadcast_to(looks.astype(np.int32), (rows, tokens, images))
        return batch | {"pixel_values": pictures, "image_attention_mask": seen}
    if tokens < 3 * images:
        raise ValueError(f"--seq {tokens}: expected room for {images} pictures, three ids each")
    begin_id, end_id = model.config.picture_ids
    batch["input_ids"][:, : 3 * images] = np.tile([begin_id, 9, end_id], images)
    return batch | {"images": pictures}


def train_step(model: Any, mesh: Mesh, rules: parallel.Rules | str, load: Load) -> Draft:
    """One update of AdamW on a batch, of all parameters that the model's config does not freeze."""
    family = registry.family(model.config.model_type).module
    boxed = abstract_params(model)
    params = nn.meta.unbox(boxed)
    trainable: Any = ()
    if family == "idefics":
        from flax_vlm.models import idefics

        trainable = exact(idefics.trainable(model.config, params))
    learning, frozen = split(params, trainable)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), learning, 1000)
    create = partial(TrainState.create, optimizer=optimizer, dtype=model.dtype)
    state = jax.eval_shape(lambda learning, frozen: create(learning, frozen, rng=jax.random.key(0)), learning, frozen)
    where = state_shardings(state, parallel.shardings(boxed, mesh, rules))
    state = jax.tree.map(_placed, state, where)

    by_row = parallel.batch_sharding(mesh, rules)
    batch = _on(by_row, _training_inputs(model, load))
    parts = 1 if family == "altclip" else load.accumulate
    if family == "altclip":
        chunk = math.gcd(load.contrastive_chunk, load.batch)
        objective = contrastive(model, microbatches=load.accumulate, chunk=chunk)
    else:
        objective = next_token(model, load.vocab_chunk)
    step = make_step(objective, optimizer, accumulate=parts)

    plain = model.clone(remat="none", attention_implementation="xla")
    plain_objective = contrastive(plain) if family == "altclip" else next_token(plain)

    def loss(objective: Objective, learning: Any, frozen: Any, batch: Any) -> Any:
        return objective(merge(learning, frozen), batch, jax.random.key(0)).total

    def kept(rows: int) -> int:
        """Bytes, of so many rows."""
        some = _training_inputs(model, dataclasses.replace(load, batch=rows))
        return kept_bytes(partial(loss, objective), learning, frozen, some)

    rows = load.batch // parts
    activations = kept(2 * rows) - kept(rows)  # weights that were cast, say, are kept too, but are none
    split_ways = ways(mesh.abstract_mesh, by_row.spec[0])

    held = {
        "parameters": _bytes(state.params) + _bytes(state.frozen),
        "optimizer": _bytes(state.opt_state),
        "batch": _bytes(batch),
    }
    flops = count_flops(jax.make_jaxpr(jax.grad(partial(loss, plain_objective)))(learning, frozen, batch))
    tokens = load.batch * load.seq
    return Draft(compiled_step(step, where), (state, batch), held, flops, tokens, activations // split_ways)


def generation(model: Any, mesh: Mesh, rules: parallel.Rules | str, load: Load) -> tuple[Draft, Draft]:
    """The reading of the prompts, and the loop that adds a token to each until all are done; flops are of one token."""
    config = GenerationConfig(max_new_tokens=load.new_tokens, eos_token_id=2, pad_token_id=0)
    request = make_request(model, inputs(model, load), config)
    boxed = abstract_params(model)
    params = jax.tree.map(_placed, nn.meta.unbox(boxed), parallel.shardings(boxed, mesh, rules))
    by_row = parallel.batch_sharding(mesh, rules)
    prompt = _on(by_row, request.inputs)
    reading = (model, request.slots, request.flags, params, prompt, None)

    logits, cache = jax.eval_shape(partial(prefill, *reading[:3]), *reading[3:])
    state = jax.eval_shape(partial(begin, request.plan), request.prompt, request.options, logits, cache)
    heads = find_rules(rules).spec(("batch", None, "heads", None))

    def place(leaf: Any) -> Any:
        """Keys and values by rows and heads, the rest by rows where there are any."""
        has_rows = leaf.ndim and leaf.shape[0] == load.batch
        spec = heads if leaf.ndim == 4 else by_row.spec if has_rows else PartitionSpec()
        parts = zip(leaf.shape, spec, strict=False)
        fitting = [axes if size % ways(mesh.abstract_mesh, axes) == 0 else None for size, axes in parts]
        return _placed(leaf, NamedSharding(mesh, PartitionSpec(*fitting)))

    state = jax.tree.map(place, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    options = _on(everywhere, request.options)
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)

    def ask(tokens: int) -> int:
        """Flops of so many tokens of a prompt."""
        plain = model.clone(attention_implementation="xla")
        short = (
            prompt
            if tokens > 1
            else {
                "input_ids": jax.ShapeDtypeStruct((load.batch, 1), jnp.int32),
                "attention_mask": jax.ShapeDtypeStruct((load.batch, 1), jnp.int32),
            }
        )
        before = None if tokens > 1 else cache

        def run(params: Any, inputs: Any, cache: Any) -> Any:
            cache = model.init_cache(load.batch, request.slots, model.dtype) if cache is None else cache
            return plain.apply({"params": params}, cache=cache, logits_to_keep=1, **inputs).logits

        return count_flops(jax.make_jaxpr(run)(params, short, before))

    weights = {"parameters": _bytes(params)}
    read = Draft(prefill, reading, weights | {"batch": _bytes(prompt)}, ask(load.seq), load.batch * load.seq)
    held = weights | {"cache": _bytes(state.cache)}
    return read, Draft(decode, (model, request.plan, params, options, state, until), held, ask(1), load.batch)


def _training_inputs(model: Any, load: Load) -> dict[str, np.ndarray]:
    """With labels, for a language model."""
    batch = inputs(model, load)
    is_language_model = registry.family(model.config.model_type).module != "altclip"
    return batch | {"labels": batch["input_ids"]} if is_language_model else batch


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _on(sharding: NamedSharding, arrays: Any) -> Any:
    return jax.tree.map(lambda array: _placed(array, sharding), arrays)


def _bytes(tree: Any) -> int:
    """On each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
