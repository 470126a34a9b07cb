"""The decoder of GLM-4V, ChatGLM4: grouped keys and values, and positions that turn half of each head.

Reference: `modeling_chatglm.py` of THUDM/glm-4v-9b. Parameter names are the reference's, its fused `query_key_value` in
three and `dense_h_to_4h` in two.

B batch   T tokens   S keys (T, or the slots of a cache)   D hidden_size   N heads   H head width
"""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from flax_vlm.layers.attention import attend
from flax_vlm.layers.feed_forward import GatedMLP
from flax_vlm.layers.kv_cache import KeyValue, KVCache
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.norms import RMSNorm
from flax_vlm.layers.rotary import rotate_interleaved
from flax_vlm.layers.stack import make_layers, run_layers
from flax_vlm.models.base import Block, Tower
from flax_vlm.models.decoder import Context, DecoderLayer
from flax_vlm.models.glm4v.config import GLM4VConfig
from flax_vlm.models.outputs import LayerOutput

normal = nn.initializers.normal


class ChatGLMAttention(Block):
    """Causal self-attention; N / `multi_query_group_num` query heads in a row share a key/value head."""

    config: GLM4VConfig

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        cache: KeyValue | None,
        context: Context,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T S"] | None, KeyValue]:
        config = self.config
        init = normal(config.initializer_range)

        def project(name: str, heads: int) -> Array:
            dense = Dense(
                heads * config.kv_channels,
                kernel_init=init,
                kernel_axes=("embed", "heads"),
                name=f"{name}_proj",
                **self.dtypes,
            )
            return dense(hidden_states).reshape(*hidden_states.shape[:2], heads, config.kv_channels)

        query = rotate_interleaved(project("q", config.num_attention_heads), context.rotation)
        key = rotate_interleaved(project("k", config.multi_query_group_num), context.rotation)
        keys = KeyValue(key, project("v", config.multi_query_group_num))
        if cache is not None:
            keys = cache.write(keys.key, keys.value, context.index)
        attended, weights = attend(
            query,
            keys.key.astype(query.dtype),
            keys.value.astype(query.dtype),
            mask=context.mask,
            dropout_rate=config.attention_dropout,
            dropout_rng=None if deterministic else self.make_rng("dropout"),
            return_weights=output_attentions,
            implementation=self.attention_implementation,
        )
        dense = Dense(
            config.hidden_size,
            use_bias=False,
            kernel_init=init,
            kernel_axes=("heads", "embed"),
            name="dense",
            **self.dtypes,
        )
        return dense(attended.reshape(*attended.shape[:2], -1)), weights, keys


class ChatGLMBlock(DecoderLayer):
    """A layer of ChatGLM4."""

    config: GLM4VConfig

    def setup(self) -> None:
        config = self.config
        self.input_layernorm = rms_norm(self)
        self.self_attention = ChatGLMAttention(config, **self.run)
        self.post_attention_layernorm = rms_norm(self)
        self.mlp = GatedMLP(config.ffn_hidden_size, "silu", kernel_init=normal(config.initializer_range), **self.dtypes)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @property
    def attention(self) -> ChatGLMAttention:
        return self.self_attention


class ChatGLMTransformer(Tower):
    """All layers, and the norm behind them."""

    config: GLM4VConfig

    def setup(self) -> None:
        self.layers = make_layers(
            lambda _: ChatGLMBlock(self.config, **self.run), self.config.num_layers, self.scan_layers
        )
        self.final_layernorm = rms_norm(self)

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        cache: KVCache | None,
        context: Context,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """The last states behind the norm, and a LayerOutput of each layer."""

        def body(layer: ChatGLMBlock, states: Array, cache: KeyValue | None) -> tuple[Array, LayerOutput]:
            return layer(states, cache, context, output_hidden_states, output_attentions, deterministic)

        caches = [None] * self.config.num_layers if cache is None else cache.layers
        hidden_states, outputs = run_layers(self.layers, body, hidden_states, caches, self.remat)
        return self.final_layernorm(hidden_states), outputs


def rms_norm(part: Block) -> RMSNorm:
    """A norm of the decoder that the config of `part` describes: rounded once, at its end."""
    return RMSNorm(part.config.layernorm_epsilon, round_before_scale=False, **part.dtypes)
