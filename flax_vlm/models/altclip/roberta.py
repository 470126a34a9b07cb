"""AltRoberta: the XLM-R encoder of AltCLIP, which can also be a decoder with cross-attention and a cache.

Reference: transformers 5.23 `AltRobertaModel`; decoder mode, relative positions and the head mask as in transformers
4.40.2, the last releases that had them.

B batch   T tokens   S keys (T, or the slots of a cache)   D hidden_size   N heads   L layers   E encoder tokens
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from flax_vlm.layers.attention import Mask, causal_mask, combine_masks, padding_mask
from flax_vlm.layers.embed import Embed
from flax_vlm.layers.kv_cache import KVCache
from flax_vlm.layers.stack import make_layers, run_layers
from flax_vlm.models.altclip.config import AltCLIPTextConfig
from flax_vlm.models.altclip.roberta_layers import AltRobertaLayer, Context, LayerMemory, LayerOutput, RobertaBlock
from flax_vlm.models.base import Tower
from flax_vlm.models.outputs import ModelOutput


def roberta_position_ids(
    input_ids: Int[Array, "B T"], pad_token_id: int, past: int | Int[Array, ""] = 0
) -> Int[Array, "B T"]:
    """Tokens count up from pad + 1, padding stays at pad; taken from the ids, not from the attention mask.

    ids  7 8 9 pad pad  ->  2 3 4 1 1      (pad = 1)
    """
    token = (input_ids != pad_token_id).astype(jnp.int32)
    return (jnp.cumsum(token, axis=1) + past) * token + pad_token_id


class AltRobertaEmbeddings(RobertaBlock):
    """Word + token type + position (absolute only), normed."""

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        table = partial(Embed, features=config.hidden_size, embedding_init=init, **self.dtypes)

        def padded(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            return init(key, shape, dtype).at[config.pad_token_id].set(0)

        self.word_embeddings = table(config.vocab_size, padding_idx=config.pad_token_id, embedding_init=padded)
        self.position_embeddings = table(
            config.max_position_embeddings,
            padding_idx=config.pad_token_id,
            embedding_init=padded,
            axes=(None, "embed"),
        )
        self.token_type_embeddings = table(config.type_vocab_size, axes=(None, "embed"))
        self.LayerNorm = self._norm()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None,
        token_type_ids: Int[Array, "B T"] | None,
        position_ids: Int[Array, "#B T"] | None,
        inputs_embeds: Float[Array, "B T D"] | None,
        past: int | Int[Array, ""] = 0,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        pad = self.config.pad_token_id
        if input_ids is not None:
            words = self.word_embeddings(input_ids)
            default_positions = roberta_position_ids(input_ids, pad, past)
        else:
            assert inputs_embeds is not None
            words = inputs_embeds
            default_positions = (jnp.arange(words.shape[1]) + past + pad + 1)[None]
        if token_type_ids is None:
            token_type_ids = jnp.zeros(words.shape[:2], jnp.int32)
        embeddings = words + self.token_type_embeddings(token_type_ids)
        # A relative model holds the table too, and its checkpoints carry it, but it is not added.
        positions = self.position_embeddings(default_positions if position_ids is None else position_ids)
        if self.config.position_embedding_type == "absolute":
            embeddings += positions
        return self.dropout(self.LayerNorm(embeddings), deterministic)


class AltRobertaEncoder(Tower):
    """The stack of layers."""

    config: AltCLIPTextConfig

    def setup(self) -> None:
        config = self.config
        if self.scan_layers and config.pruned_heads:
            raise ValueError("layers with pruned heads differ in shape and cannot be scanned: use scan_layers=False")
        self.layers = make_layers(
            lambda i: AltRobertaLayer(config, num_heads=config.heads_of(i), **self.run),
            config.num_hidden_layers,
            self.scan_layers,
        )

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        memories: list[LayerMemory],
        context: Context,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], list[tuple[Array | None, LayerOutput]]]:
        def body(
            layer: AltRobertaLayer, states: Array, memory: LayerMemory
        ) -> tuple[Array, tuple[Array | None, LayerOutput]]:
            states, output = layer(states, memory, context, output_attentions, deterministic)
            return states, (states if output_hidden_states else None, output)

        return run_layers(self.layers, body, hidden_states, memories, self.remat)


class AltRobertaPooler(RobertaBlock):
    """`tanh(dense(first token))`."""

    def setup(self) -> None:
        self.dense = self._dense(self.config.hidden_size, ("embed", "project"))

    def __call__(self, hidden_states: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return jnp.tanh(self.dense(hidden_states[:, 0]))


class AltRobertaModel(Tower):
    """XLM-R: ids to states [B, T, D].

    With `config.is_decoder` attention is causal and a `cache` (from `init_cache`) may be given; with
    `config.add_cross_attention` it attends `encoder_hidden_states`.
    """

    config: AltCLIPTextConfig
    add_pooling_layer: bool = True

    def setup(self) -> None:
        self.embeddings = AltRobertaEmbeddings(self.config, **self.run)
        self.encoder = AltRobertaEncoder(self.config, **self.run_stack)
        if self.add_pooling_layer:
            self.pooler = AltRobertaPooler(self.config, **self.run)

    @staticmethod
    def options_from_params(paths: set[str]) -> dict[str, bool]:
        """What a config does not say: whether these parameters have the pooler."""
        return {"add_pooling_layer": any(path.startswith("pooler/") for path in paths)}

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        inputs: dict[str, Array] = {"input_ids": jnp.zeros((1, 1), jnp.int32)}
        if self.config.add_cross_attention:
            inputs["encoder_hidden_states"] = jnp.zeros((1, 1, self.config.hidden_size))
        return inputs

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache of `length` tokens a row.

        Raises:
          ValueError: for a model that is no decoder, or more tokens than it has positions.
        """
        config = self.config
        if not config.is_decoder:
            raise ValueError("only a decoder has a cache: the config says is_decoder=False")
        self._check_length(length)
        heads = [config.heads_of(i) for i in range(config.num_hidden_layers)]
        return KVCache.create(batch_size, length, heads, config.head_dim, self.dtype)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "B *T S"] | Bool[Array, "B *T S"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "#B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        *,
        head_mask: Float[Array, "*L N"] | None = None,
        encoder_hidden_states: Float[Array, "B E D"] | None = None,
        encoder_attention_mask: Num[Array, "B E"] | Bool[Array, "B E"] | None = None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> ModelOutput:
        """
        Args:
          attention_mask: [B, T], nonzero = may be attended, or [B, T, S], one row per query, taken as it is;
            everything when absent. With a cache [B, T] speaks of the new tokens (the cache remembers the others).
          head_mask: [N] or [L, N], multiplies the attention probabilities.
          encoder_hidden_states: with a cache needed once; its keys are kept.
          encoder_attention_mask: which of them may be attended; all when absent.

        Raises:
          ValueError: for arguments that do not belong together or that the config does not provide for.
        """
        self._check(input_ids, inputs_embeds, head_mask, encoder_hidden_states, cache)
        past = 0 if cache is None else cache.index
        embedded = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, past, deterministic)
        if position_ids is None:
            self._check_length(embedded.shape[1])
        if encoder_hidden_states is not None and encoder_attention_mask is None:
            encoder_attention_mask = jnp.ones(encoder_hidden_states.shape[:2], bool)
        if cache is not None:
            cache = self._admit(cache, embedded, attention_mask, encoder_attention_mask)
            encoder_attention_mask = cache.cross_mask
        context = Context(
            mask=self._mask(cache, embedded, attention_mask),
            index=past,
            encoder_hidden_states=encoder_hidden_states,
            cross_mask=None if encoder_attention_mask is None else padding_mask(encoder_attention_mask),
        )

        num_layers = self.config.num_hidden_layers
        if head_mask is not None:
            head_mask = jnp.broadcast_to(head_mask, (num_layers, head_mask.shape[-1]))
        memories = [
            LayerMemory(
                cache=None if cache is None else cache.layers[i],
                cross=None if cache is None or cache.cross is None else cache.cross[i],
                head_mask=None if head_mask is None else head_mask[i],
            )
            for i in range(num_layers)
        ]
        last, outputs = self.encoder(
            embedded, memories, context, output_hidden_states, output_attentions, deterministic
        )
        states, layers = zip(*outputs, strict=True)
        if cache is not None:
            cache = cache.advance(embedded.shape[1], [layer.cache for layer in layers])
            if cache.cross_mask is not None:
                cache = cache.replace(cross=tuple(layer.cross for layer in layers))
        cross_attentions = tuple(layer.cross_attentions for layer in layers)
        return ModelOutput(
            last_hidden_state=last,
            pooler_output=self.pooler(last) if self.add_pooling_layer else None,
            hidden_states=(embedded, *states) if output_hidden_states else None,
            attentions=tuple(layer.attentions for layer in layers) if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions and None not in cross_attentions else None,
            cache=cache,
        )

    def _check(
        self,
        input_ids: Array | None,
        inputs_embeds: Array | None,
        head_mask: Array | None,
        encoder_hidden_states: Array | None,
        cache: KVCache | None,
    ) -> None:
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if encoder_hidden_states is not None and not config.add_cross_attention:
            raise ValueError("encoder_hidden_states need a config with is_decoder=True and add_cross_attention=True")
        if cache is not None and not config.is_decoder:
            raise ValueError("only a decoder takes a cache: the config says is_decoder=False")
        if head_mask is not None:
            shapes = ((config.num_attention_heads,), (config.num_hidden_layers, config.num_attention_heads))
            if head_mask.shape not in shapes:
                raise ValueError(f"head_mask has shape {head_mask.shape}: expected {shapes[0]} or {shapes[1]}")
            if config.pruned_heads:
                raise ValueError("head_mask counts all heads, but some are pruned: prune the others as well instead")

    def _check_length(self, num_tokens: int) -> None:
        config = self.config
        limit = config.max_position_embeddings
        if config.position_embedding_type == "absolute":
            limit -= config.pad_token_id + 1  # positions count from pad + 1
        if num_tokens > limit:
            raise ValueError(f"{num_tokens} tokens: the model has positions for {limit}; truncate the text")

    def _admit(
        self, cache: KVCache, embedded: Array, attention_mask: Array | None, encoder_attention_mask: Array | None
    ) -> KVCache:
        """`cache` with slots open for the new tokens, and with the mask of encoder states that have come."""
        may_attend = jnp.ones(embedded.shape[:2], bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape != embedded.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {attention_mask.shape}: with a cache it speaks of the new tokens only, "
                    f"{embedded.shape[:2]}"
                )
            may_attend = attention_mask != 0
        if encoder_attention_mask is not None:
            cache = cache.replace(cross_mask=encoder_attention_mask != 0)
        return cache.admit(may_attend)

    def _mask(self, cache: KVCache | None, embedded: Array, attention_mask: Array | None) -> Mask | None:
        """What each token may attend; a mask of one row per query is taken as it is, also in a decoder."""
        num_tokens = embedded.shape[1]
        if attention_mask is not None and attention_mask.ndim == 3:
            return padding_mask(attention_mask)
        if cache is not None:
            return cache.mask(num_tokens)
        return combine_masks(
            None if attention_mask is None else padding_mask(attention_mask),
            causal_mask(num_tokens, num_tokens) if self.config.is_decoder else None,
        )
