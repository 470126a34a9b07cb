"""What the decoders of all families share.

B batch   T tokens   D model width   V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import struct
from jaxtyping import Array, Float, Int

from flax_vlm.layers.attention import Mask
from flax_vlm.layers.kv_cache import KeyValue
from flax_vlm.layers.losses import mean_loss, next_token_sums, next_token_sums_in_chunks
from flax_vlm.layers.quantized import Quantized
from flax_vlm.layers.rotary import Rotation
from flax_vlm.models.base import Block
from flax_vlm.models.outputs import LayerOutput


class Context(struct.PyTreeNode):
    """What all layers of a call share; `index` is the cache's slot of the first new token."""

    mask: Mask
    rotation: Rotation
    index: int | Int[Array, ""] = 0


class DecoderLayer(Block):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    A family makes `input_layernorm`, `post_attention_layernorm`, `mlp`, `dropout` and its attention in `setup`.
    """

    @property
    def attention(self) -> Any:
        """The module, under the name that the family has for it."""
        raise NotImplementedError

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        cache: KeyValue | None,
        context: Context,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], LayerOutput]:
        attended, weights, keys = self.attention(
            self.input_layernorm(hidden_states), cache, context, output_attentions, deterministic
        )
        hidden_states += self.dropout(attended, deterministic)
        inner = self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states += self.dropout(inner, deterministic)
        return hidden_states, LayerOutput(
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=weights,
            cache=None if cache is None else keys,
        )


class Prediction(NamedTuple):
    """What a head makes of states; `loss` is the mean over the `loss_weight` tokens that count."""

    logits: Float[Array, "B T V"] | None
    loss: Float[Array, ""] | None = None
    loss_weight: Float[Array, ""] | None = None


def predict(
    states: Float[Array, "B T D"],
    head: Callable[[Array], Array],
    tables: Callable[[], Sequence[Array | Quantized]],
    expected: tuple[Array, Array | None, Array | None] | None,
    vocab_chunk: int,
    words_first: bool = False,
) -> Prediction:
    """Logits, and the loss where something is `expected`: labels, attention mask and segments.

    Args:
      head: states to logits.
      tables: what it multiplies by, and `words_first`: see `next_token_sums_in_chunks`.
      vocab_chunk: compute the loss over so many words at a time, and no logits; 0 for all at once.

    Raises:
      ValueError: for chunks where nothing is expected, or of a head in eight bits.
    """
    if not vocab_chunk:
        logits = head(states)
        if expected is None:
            return Prediction(logits)
        sums = next_token_sums(logits, *expected)
    elif expected is None:
        raise ValueError("vocab_chunk came without labels: it is the loss that is computed in chunks")
    else:
        logits = None
        floats = [table for table in tables() if not isinstance(table, Quantized)]
        if not floats:
            raise ValueError("vocab_chunk is for training: load the weights without `quantize`")
        sums = next_token_sums_in_chunks(states, floats, *expected, chunk=vocab_chunk, words_first=words_first)
    return Prediction(logits, mean_loss(*sums), sums[1])
