"""What a family minimises: a function of parameters and batch that gives a sum and its weight.

The loss is their quotient. So a batch in parts has the loss of the whole: sums are added, and divided at the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from flax_vlm.layers.contrastive import sigmoid_contrastive_sum, softmax_contrastive_sum

Kind: TypeAlias = Literal["softmax", "sigmoid"]


class Loss(NamedTuple):
    """The sum over everything that counts, and how much does: tokens, or pairs. The mean is their quotient."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


# (parameters of the model, batch, key) to the loss. The key is that of dropout.
Objective: TypeAlias = Callable[[Any, Mapping[str, Any], Array], Loss]


def next_token(model: Any, vocab_chunk: int = 0) -> Objective:
    """Cross-entropy of the next token, for IDEFICS and GLM-4V; a batch holds the model's inputs, with `labels`.

    Args:
      vocab_chunk: compute it over so many words at a time, so that logits never exist; 0 is all at once.
    """

    def objective(params: Any, batch: Mapping[str, Any], rng: Array) -> Loss:
        output = model.apply({"params": params}, **batch, vocab_chunk=vocab_chunk, **_running(model, rng))
        return Loss(output.loss * output.loss_weight, output.loss_weight)

    return objective


def contrastive(
    model: Any, kind: Kind = "softmax", *, microbatches: int = 1, chunk: int = 0, bias: float = -10.0
) -> Objective:
    """The loss of AltCLIP over the pairs of a whole batch; it holds `input_ids`, `pixel_values` and so on.

    The whole batch is what a pair is told from, so it cannot be summed over parts of it.

    Args:
      kind: "softmax" is AltCLIP's own, "sigmoid" SigLIP's (arXiv:2303.15343).
      microbatches: run the towers over so many parts of the batch, one after the other, and again for their gradients:
        memory is that of one part, the loss that of the whole.
      chunk: images that the loss takes at a time, a divisor of the batch; 0 is all at once.
      bias: of the logits of "sigmoid"; a constant, for AltCLIP has no parameter for it, and SigLIP's begins at -10.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"unknown contrastive loss {kind!r}: expected 'softmax' or 'sigmoid'")

    def objective(params: Any, batch: Mapping[str, Any], rng: Array) -> Loss:
        def embed(rows: Mapping[str, Any], rng: Array) -> tuple[Array, Array]:
            output = model.apply({"params": params}, **rows, **_running(model, rng))
            return output.text_embeds, output.image_embeds  # its logits, asked for by nobody, jit does not compute

        if microbatches == 1:
            texts, images = embed(batch, rng)
        else:
            texts, images = _in_parts(embed, batch, rng, microbatches)
        scale = jnp.exp(params["logit_scale"].astype(texts.dtype))
        if kind == "softmax":
            total = softmax_contrastive_sum(texts, images, scale, chunk)
        else:
            total = sigmoid_contrastive_sum(texts, images, scale, bias, chunk)
        return Loss(total, jnp.full_like(total, len(texts)))

    return objective


def _in_parts(
    embed: Callable[[Mapping[str, Any], Array], Any], batch: Mapping[str, Any], rng: Array, parts: int
) -> Any:
    """What `embed` makes of each row, computed part by part, and again in the backward pass.

    Part i has rows i, i + parts ..., so that each device keeps the rows it has.
    """
    for name, rows in batch.items():
        if len(rows) % parts:
            raise ValueError(f"{name} has {len(rows)} rows: expected a multiple of the {parts} microbatches")
    split = {name: optax.microbatching.reshape_batch_axis(rows, len(rows) // parts) for name, rows in batch.items()}
    again = jax.checkpoint(embed, prevent_cse=False)
    embedded = jax.lax.map(lambda part: again(*part), (split, jax.random.split(rng, parts)))
    return jax.tree.map(lambda each: each.swapaxes(0, 1).reshape(-1, *each.shape[2:]), embedded)


def _running(model: Any, rng: Array) -> dict[str, Any]:
    """How to run a model: with dropout, where its config has any."""
    return {"deterministic": False, "rngs": {"dropout": rng}} if has_dropout(model.config) else {}


def has_dropout(config: Any) -> bool:
    """Whether a config, or one inside it, drops anything while training."""
    parts = {field.name: getattr(config, field.name) for field in fields(config)}
    return any(has_dropout(part) if is_dataclass(part) else "dropout" in name and part for name, part in parts.items())
