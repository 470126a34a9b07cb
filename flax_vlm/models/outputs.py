"""What models return; the fields are named as in transformers, absent parts are None.

B batch   T tokens   P patches + 1   D width   N heads
"""

from flax import struct
from jaxtyping import Array, Float

from flax_vlm.layers.kv_cache import KVCache


class ModelOutput(struct.PyTreeNode):
    """States of one tower. `hidden_states[0]` is the embedding output, the last entry that of the last layer."""

    last_hidden_state: Float[Array, "B T D"]
    pooler_output: Float[Array, "B E"] | None = None
    hidden_states: tuple[Float[Array, "B T F"], ...] | None = None
    attentions: tuple[Float[Array, "B _ T S"], ...] | None = None
    cross_attentions: tuple[Float[Array, "B _ T E"], ...] | None = None
    cache: KVCache | None = None
