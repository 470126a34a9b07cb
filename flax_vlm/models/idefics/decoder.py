"""IDEFICS' decoder: LLaMA layers, and in front of every `cross_layer_interval`-th a gated look at the images.

Reference: transformers 5.23 `IdeficsDecoderLayer` and the loop of `IdeficsModel`. Parameter names are the reference's.

B batch   T tokens   S keys (T, or the slots of a cache)   D hidden_size   N heads   H head width   I images
"""

from collections.abc import Sequence

from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from flax_vlm.layers.attention import attend
from flax_vlm.layers.feed_forward import GatedMLP
from flax_vlm.layers.gated_cross_attention import GatedCrossAttention, alpha_init
from flax_vlm.layers.kv_cache import KeyValue
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.norms import RMSNorm
from flax_vlm.layers.rotary import rotate
from flax_vlm.models import decoder
from flax_vlm.models.base import Block, Tower
from flax_vlm.models.decoder import DecoderLayer
from flax_vlm.models.idefics.config import IdeficsConfig
from flax_vlm.models.outputs import LayerOutput

normal = nn.initializers.normal


class Context(decoder.Context):
    """What all layers of a call share, the images among it."""

    image_states: Float[Array, "B S E"] | None = None
    may_see: Bool[Array, "B T I"] | None = None


class BlockMemory(struct.PyTreeNode):
    """What a cross layer and the decoder layers behind it bring to a call from the cache, and leave to it."""

    cross: KeyValue | None
    layers: tuple[KeyValue | None, ...]


class IdeficsAttention(Block):
    """Causal self-attention with rotary positions."""

    config: IdeficsConfig

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

        def dense(name: str, axes: tuple[str, str]) -> Dense:
            return Dense(
                config.hidden_size,
                use_bias=False,
                kernel_init=normal(config.initializer_range),
                kernel_axes=axes,
                name=f"{name}_proj",
                **self.dtypes,
            )

        shape = (*hidden_states.shape[:2], config.num_attention_heads, config.head_dim)
        query, key, value = (dense(name, ("embed", "heads"))(hidden_states).reshape(shape) for name in "qkv")
        keys = KeyValue(rotate(key, context.rotation), value)
        if cache is not None:
            keys = cache.write(keys.key, keys.value, context.index)
        attended, weights = attend(
            rotate(query, context.rotation),
            keys.key.astype(query.dtype),
            keys.value.astype(query.dtype),
            mask=context.mask,
            dropout_rate=config.dropout,
            dropout_rng=None if deterministic else self.make_rng("dropout"),
            return_weights=output_attentions,
            implementation=self.attention_implementation,
        )
        return dense("o", ("heads", "embed"))(attended.reshape(hidden_states.shape)), weights, keys


class IdeficsDecoderLayer(DecoderLayer):
    """A layer of LLaMA."""

    config: IdeficsConfig

    def setup(self) -> None:
        config = self.config
        self.self_attn = IdeficsAttention(config, **self.run)
        self.mlp = GatedMLP(
            config.intermediate_size, config.hidden_act, kernel_init=normal(config.initializer_range), **self.dtypes
        )
        self.input_layernorm = RMSNorm(config.rms_norm_eps, **self.dtypes)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, **self.dtypes)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def attention(self) -> IdeficsAttention:
        return self.self_attn


def cross_layer(part: Block) -> GatedCrossAttention:
    """The gated cross-attention that the config of `part` describes."""
    config: IdeficsConfig = part.config
    return GatedCrossAttention(
        config.num_attention_heads,
        config.hidden_size,
        config.intermediate_size,
        config.hidden_act,
        config.alpha_type,  # pyright: ignore[reportArgumentType] - the config has checked it
        alpha_init(config.alpha_initializer, config.alphas_initializer_range),  # pyright: ignore[reportArgumentType]
        config.qk_layer_norms,
        config.rms_norm_eps,
        dropout=config.dropout,
        kernel_init=normal(config.initializer_range),
        **part.run,
    )


def look(
    layer: GatedCrossAttention,
    hidden_states: Float[Array, "B T D"],
    images: KeyValue | None,
    context: Context,
    deterministic: bool,
) -> tuple[Float[Array, "B T D"], KeyValue | None]:
    """One look at the images, whose keys and values are computed by the call that brings them."""
    if context.image_states is not None:
        images = layer.project(context.image_states)
    return layer(hidden_states, images, context.may_see, deterministic), images


class IdeficsBlock(Tower):
    """A look at the images and the decoder layers behind it: what a scan goes over."""

    config: IdeficsConfig

    def setup(self) -> None:
        self.gated_cross_attn_layers = cross_layer(self)
        interval = self.config.cross_layer_interval
        layers = [IdeficsDecoderLayer(self.config, **self.run) for _ in range(interval)]
        self.layers = layers if interval > 1 else layers[0]

    def __call__(
        self, hidden_states: Float[Array, "B T D"], memory: BlockMemory, context: Context, flags: Sequence[bool]
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValue | None, list[LayerOutput]]]:
        """`flags`: output_hidden_states, output_attentions, deterministic."""
        layers = self.layers if isinstance(self.layers, Sequence) else [self.layers]
        hidden_states, images = look(self.gated_cross_attn_layers, hidden_states, memory.cross, context, flags[-1])
        outputs = []
        for layer, cache in zip(layers, memory.layers, strict=True):
            hidden_states, output = layer(hidden_states, cache, context, *flags)
            outputs.append(output)
        return hidden_states, (images, outputs)
