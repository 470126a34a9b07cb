"""What models return; the fields are named as in transformers, absent parts are None.

B batch   T tokens   P patches + 1   D width   N heads   S keys   K kept
"""

from flax import struct
from jaxtyping import Array, Float, Int

from flax_vlm.layers.kv_cache import KeyValue, KVCache


class ModelOutput(struct.PyTreeNode):
    """States of one tower. `hidden_states[0]` is the embedding output, the last entry that of the last layer."""

    last_hidden_state: Float[Array, "B T D"]
    pooler_output: Float[Array, "B E"] | None = None
    hidden_states: tuple[Float[Array, "B T F"], ...] | None = None
    attentions: tuple[Float[Array, "B _ T S"], ...] | None = None
    cross_attentions: tuple[Float[Array, "B _ T E"], ...] | None = None
    cache: KVCache | None = None


class LayerOutput(struct.PyTreeNode):
    """What one decoder layer leaves behind."""

    hidden_states: Float[Array, "B T D"] | None = None
    attentions: Float[Array, "B N T S"] | None = None
    cache: KeyValue | None = None


def states_to_keep(states: Float[Array, "B T D"], logits_to_keep: int | Int[Array, " K"]) -> Float[Array, "B K D"]:
    """The states that a head makes logits of: all for 0, the last k for k, those at its indices for an array.

    Raises:
      ValueError: for an array of another shape, such as a number that jit traces.
    """
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return states[:, logits_to_keep]
    raise ValueError(
        f"logits_to_keep has shape {logits_to_keep.shape}: expected an int that jit does not trace, or indices"
    )
