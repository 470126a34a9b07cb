"""The layers of AltRoberta: post-norm blocks, `norm(x + f(x))`, of an XLM-R encoder or decoder.

Reference: transformers 5.23 `AltRobertaLayer`; cross-attention, relative positions and the head mask as in transformers
4.40.2, the last releases that had them. Parameter names are the reference's.

B batch   T tokens   S keys (T, or the slots of a cache)   D hidden_size   N heads   H head width   E encoder tokens
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from flax_vlm.layers.attention import Mask, attend
from flax_vlm.layers.embed import Embed
from flax_vlm.layers.feed_forward import activation
from flax_vlm.layers.kv_cache import KeyValue
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.norms import LayerNorm
from flax_vlm.layers.partitioning import INNER, constrain
from flax_vlm.models.altclip.config import AltCLIPTextConfig
from flax_vlm.models.base import Block


class RobertaBlock(Block):
    """Part of the tower, with its kinds of layers."""

    config: AltCLIPTextConfig

    def _dense(self, features: int, axes: tuple[str, str]) -> Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return Dense(features, kernel_init=init, kernel_axes=axes, **self.dtypes)

    def _norm(self) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, **self.dtypes)


class Context(struct.PyTreeNode):
    """What all layers of a call share."""

    mask: Mask | None = None
    index: int | Int[Array, ""] = 0
    encoder_hidden_states: Float[Array, "B E D"] | None = None
    cross_mask: Mask | None = None


class LayerMemory(struct.PyTreeNode):
    """What one layer brings to a call: its slots of the cache, its cross-attention keys, its head mask."""

    cache: KeyValue | None = None
    cross: KeyValue | None = None
    head_mask: Float[Array, " N"] | None = None


class LayerOutput(struct.PyTreeNode):
    """What one layer leaves behind besides the hidden states."""

    attentions: Float[Array, "B N T S"] | None = None
    cross_attentions: Float[Array, "B N T E"] | None = None
    cache: KeyValue | None = None
    cross: KeyValue | None = None


class AltRobertaSelfAttention(RobertaBlock, kw_only=True):
    """Multi-head attention of `num_heads` heads over `hidden_states`, `encoder_hidden_states` or a cache."""

    num_heads: int
    relative: str = "absolute"

    def setup(self) -> None:
        width = self.num_heads * self.config.head_dim
        self.query, self.key, self.value = (self._dense(width, ("embed", "heads")) for _ in range(3))
        if self.relative != "absolute":
            rows = 2 * self.config.max_position_embeddings - 1
            self.distance_embedding = Embed(
                rows,
                self.config.head_dim,
                embedding_init=nn.initializers.normal(self.config.initializer_range),
                axes=(None, "head_dim"),
                **self.dtypes,
            )

    def project(self, states: Float[Array, "B S D"]) -> KeyValue:
        """Keys and values of `states`, [B, S, N, H] each."""
        shape = (*states.shape[:2], self.num_heads, self.config.head_dim)
        return KeyValue(self.key(states).reshape(shape), self.value(states).reshape(shape))

    def _relative_bias(self, query: Array, key: Array, offset: int | Array) -> Float[Array, "B N T S"]:
        """Learned scores by distance: q.E[l - r], for relative_key_query also k.E[l - r] (Shaw et al.,
        arXiv:1803.02155; Huang et al., arXiv:2009.13658). Query t sits at slot `offset + t`, whatever came before;
        the reference gets several tokens on a cache wrong here."""
        slots = jnp.arange(query.shape[1])[:, None] + offset
        distance = slots - jnp.arange(key.shape[1])
        limit = self.config.max_position_embeddings - 1
        table = self.distance_embedding(jnp.clip(distance + limit, 0, 2 * limit))
        bias = jnp.einsum("btnh,tsh->bnts", query, table)
        if self.relative == "relative_key_query":
            bias += jnp.einsum("bsnh,tsh->bnts", key, table)
        return bias * self.config.head_dim**-0.5

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        key_value: KeyValue,
        mask: Mask | None,
        head_mask: Float[Array, " N"] | None = None,
        offset: int | Int[Array, ""] = 0,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T _"], Float[Array, "B N T S"] | None]:
        shape = (*hidden_states.shape[:2], self.num_heads, self.config.head_dim)
        query = self.query(hidden_states).reshape(shape)
        bias = None
        if self.relative != "absolute":
            bias = self._relative_bias(query, key_value.key.astype(query.dtype), offset)
        attended, weights = attend(
            query,
            key_value.key.astype(query.dtype),
            key_value.value.astype(query.dtype),
            mask=mask,
            bias=bias,
            dropout_rate=self.config.attention_probs_dropout_prob,
            dropout_rng=None if deterministic else self.make_rng("dropout"),
            return_weights=output_attentions,
            implementation=self.attention_implementation,
        )
        if head_mask is not None:  # scaling a head's probabilities scales what it gives
            attended *= head_mask.astype(attended.dtype)[:, None]
            weights = None if weights is None else weights * head_mask.astype(weights.dtype)[:, None, None]
        return attended.reshape(*shape[:2], self.num_heads * self.config.head_dim), weights


class AltRobertaOutput(RobertaBlock):
    """`norm(dropout(dense(x)) + residual)`, behind attention and behind the feed-forward."""

    input_axis: str = "heads"

    def setup(self) -> None:
        self.dense = self._dense(self.config.hidden_size, (self.input_axis, "embed"))
        self.LayerNorm = self._norm()
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(
        self, states: Float[Array, "B T F"], residual: Float[Array, "B T D"], deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        return self.LayerNorm(self.dropout(self.dense(states), deterministic) + residual)


class AltRobertaAttention(RobertaBlock, kw_only=True):
    """Attention with its output block, the checkpoint's `attention` or `crossattention`."""

    num_heads: int
    relative: str = "absolute"

    def setup(self) -> None:
        self.self = AltRobertaSelfAttention(self.config, num_heads=self.num_heads, relative=self.relative, **self.run)
        self.output = AltRobertaOutput(self.config, **self.run)

    def project(self, states: Float[Array, "B S D"]) -> KeyValue:
        """Keys and values of `states`."""
        return self.self.project(states)

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        key_value: KeyValue,
        mask: Mask | None,
        head_mask: Float[Array, " N"] | None = None,
        offset: int | Int[Array, ""] = 0,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T S"] | None]:
        attended, weights = self.self(
            hidden_states, key_value, mask, head_mask, offset, output_attentions, deterministic
        )
        return self.output(attended, hidden_states, deterministic), weights


class AltRobertaIntermediate(RobertaBlock):
    """`act(dense(x))`."""

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        dense = self._dense(self.config.intermediate_size, ("embed", "mlp")).copy(name="dense")
        return constrain(activation(self.config.hidden_act)(dense(hidden_states)), INNER)


class AltRobertaLayer(RobertaBlock, kw_only=True):
    """Self-attention, in a decoder cross-attention, feed-forward."""

    num_heads: int

    def setup(self) -> None:
        config = self.config
        attention = partial(AltRobertaAttention, config, **self.run)
        self.attention = attention(num_heads=self.num_heads, relative=config.position_embedding_type)
        if config.add_cross_attention:
            self.crossattention = attention(num_heads=config.num_attention_heads)
        self.intermediate = AltRobertaIntermediate(config, **self.run)
        self.output = AltRobertaOutput(config, input_axis="mlp", **self.run)

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        memory: LayerMemory,
        context: Context,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], LayerOutput]:
        flags = (output_attentions, deterministic)
        keys = self.attention.project(hidden_states)
        if memory.cache is not None:
            keys = memory.cache.write(keys.key, keys.value, context.index)
        hidden_states, attentions = self.attention(
            hidden_states, keys, context.mask, memory.head_mask, context.index, *flags
        )
        cross, cross_attentions = memory.cross, None
        if context.encoder_hidden_states is not None:
            cross = self.crossattention.project(context.encoder_hidden_states)
        if cross is not None:
            hidden_states, cross_attentions = self.crossattention(
                hidden_states, cross, context.cross_mask, memory.head_mask, 0, *flags
            )
        hidden_states = self.output(self.intermediate(hidden_states), hidden_states, deterministic)
        remembers = memory.cache is not None
        return hidden_states, LayerOutput(
            attentions=attentions,
            cross_attentions=cross_attentions,
            cache=keys if remembers else None,
            cross=cross if remembers else None,
        )
