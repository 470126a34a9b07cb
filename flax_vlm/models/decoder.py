"""What the decoders of all families share.

B batch   T tokens   D model width
"""

from typing import Any

from flax import struct
from jaxtyping import Array, Float, Int

from flax_vlm.layers.attention import Mask
from flax_vlm.layers.kv_cache import KeyValue
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
