"""Attention weights for whoever asks, without a change to what a module returns.

    output, kept = model.apply({"params": params}, **inputs, mutable=["attention_weights"])

`kept` then holds the weights of the attentions that have no `output_attentions`, under the names of their modules.
Nobody else pays for them: they are formed, by the plain path of `attend`, where the collection may be written.
"""

from flax import linen as nn
from jaxtyping import Array

KEPT = "attention_weights"


def are_wanted(module: nn.Module) -> bool:
    """Whether to ask `attend` for its weights."""
    return module.is_mutable_collection(KEPT) and not module.is_initializing()


def keep(module: nn.Module, weights: Array | None) -> None:
    """Leaves what `attend` gave."""
    if weights is not None:
        module.sow(KEPT, "weights", weights)
