"""IDEFICS (Laurençon et al., arXiv:2306.16527): an open Flamingo. Interleaved images and text to text.

Reference: transformers 5.23 `IdeficsModel` and `IdeficsForVisionText2Text`; the loss and `hidden_states[0]` as in the
releases up to 4.51. Parameter names are the reference's.

B batch   T tokens   I images a row   P tokens an image   L latents   D hidden_size   E embed_dim   W whole vocabulary
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from flax_vlm.layers.attention import Mask, causal_mask, padding_mask, segment_mask
from flax_vlm.layers.decoupled import DecoupledEmbed, DecoupledHead
from flax_vlm.layers.kv_cache import KeyValue, KVCache
from flax_vlm.layers.norms import RMSNorm
from flax_vlm.layers.partitioning import ROWS, constrain
from flax_vlm.layers.patch_embed import padded_scale
from flax_vlm.layers.perceiver import PerceiverResampler
from flax_vlm.layers.rotary import rotation
from flax_vlm.layers.segments import check_segments, count_positions
from flax_vlm.layers.stack import run_layers
from flax_vlm.models.base import Tower
from flax_vlm.models.clip_vision import CLIPVisionTransformer
from flax_vlm.models.decoder import predict
from flax_vlm.models.idefics.config import IdeficsConfig, IdeficsVisionConfig
from flax_vlm.models.idefics.decoder import (
    BlockMemory,
    Context,
    IdeficsBlock,
    IdeficsDecoderLayer,
    cross_layer,
    look,
)
from flax_vlm.models.outputs import states_to_keep


class IdeficsOutput(struct.PyTreeNode):
    """States of the decoder; `hidden_states[0]` is the embedding output, the last entry behind the final norm.

    With a cache the S of `attentions` counts all of its slots.
    """

    last_hidden_state: Float[Array, "B T D"]
    image_hidden_states: Float[Array, "B I P E"] | None = None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None = None
    attentions: tuple[Float[Array, "B N T S"], ...] | None = None
    cache: KVCache | None = None


class IdeficsCausalLMOutput(struct.PyTreeNode):
    """Logits over vocabulary and additional tokens, and what `IdeficsOutput` holds.

    `loss` is the mean over the `loss_weight` tokens that count.
    """

    logits: Float[Array, "B T W"] | None = None
    loss: Float[Array, ""] | None = None
    loss_weight: Float[Array, ""] | None = None
    image_hidden_states: Float[Array, "B I P E"] | None = None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None = None
    attentions: tuple[Float[Array, "B N T S"], ...] | None = None
    cache: KVCache | None = None


class IdeficsVisionModel(CLIPVisionTransformer):
    """The image tower. Positions at other picture sizes are interpolated by DINO's rule, with 0.1 patch added."""

    config: IdeficsVisionConfig
    position_scale: Any = padded_scale


class IdeficsPerceiverResampler(Tower):
    """The resampler that the config of the whole model describes; see `PerceiverResampler`."""

    config: IdeficsConfig

    def setup(self) -> None:
        sizes = self.config.perceiver_config
        self.resampler = PerceiverResampler(
            embed_dim=self.config.vision_config.embed_dim,
            depth=sizes.resampler_depth,
            num_heads=sizes.resampler_n_heads,
            head_dim=sizes.resampler_head_dim,
            num_latents=sizes.resampler_n_latents,
            qk_layer_norms=sizes.qk_layer_norms_perceiver,
            kernel_init=nn.initializers.normal(self.config.initializer_range),
            remat=self.remat,
            **self.run,
        )
        nn.share_scope(self, self.resampler)  # its parameters are ours, without a name between

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        return {"context": jnp.zeros((1, 1, self.config.vision_config.embed_dim))}

    def __call__(self, context: Float[Array, "B P E"]) -> Float[Array, "B L E"]:
        return self.resampler(context)


class IdeficsModel(Tower):
    """Ids and images to states [B, T, D].

    Images come as `pixel_values`, or as what the tower (`image_encoder_embeddings`) or the resampler
    (`perceiver_embeddings`) made of them; with a cache they are needed once. Without any, text alone is read.
    """

    config: IdeficsConfig
    pixel_input = "pixel_values"

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)

        def padded(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            """The row of padding starts at zero; unlike AltCLIP's it learns."""
            table = init(key, shape, dtype)
            return table if config.pad_token_id is None else table.at[config.pad_token_id].set(0)

        self.embed_tokens = DecoupledEmbed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=padded,
            num_additional_embeddings=config.additional_vocab_size,
            additional_init=init,
            **self.dtypes,
        )
        self.vision_model = IdeficsVisionModel(config.vision_config, **self.run_stack)
        if config.use_resampler:
            self.perceiver_resampler = IdeficsPerceiverResampler(config, **self.run_stack)
        if self.scan_layers:
            self.blocks = IdeficsBlock(config, **self.run)
        else:
            self.layers = [IdeficsDecoderLayer(config, **self.run) for _ in range(config.num_hidden_layers)]
            self.gated_cross_attn_layers = [cross_layer(self) for _ in range(self._num_blocks)]
        self.norm = RMSNorm(config.rms_norm_eps, **self.dtypes)

    @property
    def _num_blocks(self) -> int:
        return self.config.num_hidden_layers // self.config.cross_layer_interval

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        vision = self.config.vision_config
        shape = (1, 1, vision.image_size, vision.image_size, vision.num_channels)
        return {
            "input_ids": jnp.zeros((1, 1), jnp.int32),
            "pixel_values": jnp.zeros(shape),
            "image_attention_mask": jnp.ones((1, 1, 1), jnp.int32),
        }

    @nn.nowrap
    def init_cache(
        self, batch_size: int, length: int, dtype: Dtype | None = None, num_images: int | None = None
    ) -> KVCache:
        """An empty cache of `length` tokens a row, and of the keys of `num_images` at which nothing looks yet."""
        config = self.config
        heads, dtype = config.num_attention_heads, dtype or self.dtype
        cache = KVCache.create(batch_size, length, [heads] * config.num_hidden_layers, config.head_dim, dtype)
        if num_images is None:
            return cache
        unseen = KVCache.create(
            batch_size, num_images * config.image_tokens, [heads] * self._num_blocks, config.head_dim, dtype
        )
        return cache.replace(cross=unseen.layers, cross_mask=jnp.zeros((batch_size, num_images), bool))

    def encode_images(
        self,
        pixel_values: Float[Array, "B I height width C"],
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> dict[str, Float[Array, "B I P E"]]:
        """What text looks at, by the name of the input that takes it in place of `pixel_values`."""
        batch = len(pixel_values)
        images = self._images(batch, pixel_values, None, None, interpolate_pos_encoding, deterministic)
        assert images is not None
        return {self._encoded: images}

    @nn.nowrap
    def empty_encodings(self, batch_size: int, num_images: int) -> dict[str, Float[Array, "B I P E"]]:
        """Those of no image."""
        config = self.config
        shape = (batch_size, num_images, config.image_tokens, config.vision_config.embed_dim)
        return {self._encoded: jnp.zeros(shape, self.dtype)}

    @property
    def _encoded(self) -> str:
        return "perceiver_embeddings" if self.config.use_resampler else "image_encoder_embeddings"

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "B T"] | Bool[Array, "B T"] | None = None,
        position_ids: Int[Array, "#B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        *,
        pixel_values: Float[Array, "B I height width C"] | None = None,
        image_encoder_embeddings: Float[Array, "B I P E"] | None = None,
        perceiver_embeddings: Float[Array, "B I L E"] | None = None,
        image_attention_mask: Num[Array, "B T I"] | Bool[Array, "B T I"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        interpolate_pos_encoding: bool = False,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> IdeficsOutput:
        """
        Args:
          attention_mask: nonzero = a token, zero = padding; all tokens when absent. With a cache it speaks of the new
            tokens (the cache remembers the others).
          position_ids: counted over the tokens that are no padding, in each segment anew, when absent.
          pixel_values: channels-last.
          image_attention_mask: nonzero = token t looks at image i. With a cache that has images, tokens look at what
            the last token before them looked at when it is absent.
          segment_ids: the document of each token, where a row holds several: 1, 2 ..., and 0 for padding.

        Raises:
          ValueError: for arguments that do not belong together.
        """
        if input_ids is not None and inputs_embeds is None:
            embedded = self.embed_tokens(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            embedded = inputs_embeds.astype(self.dtype)
        else:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        batch, length, _ = embedded.shape
        tokens = (batch, length)
        is_token = jnp.ones(tokens, bool) if attention_mask is None else attention_mask != 0
        if is_token.shape != tokens:
            raise ValueError(
                f"attention_mask has shape {is_token.shape}: expected {tokens}, with a cache of the new tokens only"
            )
        if segment_ids is not None:
            check_segments(segment_ids, tokens, cache is not None)
            is_token &= segment_ids != 0
        past = 0 if cache is None else cache.may_attend.sum(-1, keepdims=True)
        if position_ids is None:
            position_ids = jnp.where(is_token, past + count_positions(is_token, segment_ids), 1)
        images = self._images(
            batch, pixel_values, image_encoder_embeddings, perceiver_embeddings, interpolate_pos_encoding, deterministic
        )
        may_see = self._may_see(images, image_attention_mask, cache, tokens)

        own = padding_mask(is_token) if segment_ids is None else segment_mask(jnp.where(is_token, segment_ids, 0))
        mask: Mask = own & causal_mask(length, length)
        if cache is not None:
            cache = cache.admit(is_token)
            mask = cache.mask(length)
        context = Context(
            mask=mask,
            rotation=rotation(position_ids, self.config.head_dim, self.config.rope_theta, self.dtype),
            index=0 if cache is None else cache.index,
            image_states=None if images is None else images.reshape(batch, -1, images.shape[-1]),
            may_see=may_see,
        )
        flags = (output_hidden_states, output_attentions, deterministic)
        states, cross, outputs = self._run(embedded, cache, context, flags)
        states = self.norm(states)
        if cache is not None:
            cache = cache.advance(length, [output.cache for output in outputs])
            if may_see is not None:
                cache = cache.replace(cross=tuple(cross), cross_mask=may_see[:, -1])
        return IdeficsOutput(
            last_hidden_state=states,
            image_hidden_states=images,
            hidden_states=(embedded, *(output.hidden_states for output in outputs[:-1]), states)
            if output_hidden_states
            else None,
            attentions=tuple(output.attentions for output in outputs) if output_attentions else None,
            cache=cache,
        )

    def _run(
        self, states: Array, cache: KVCache | None, context: Context, flags: tuple[bool, bool, bool]
    ) -> tuple[Array, list[Any], list[Any]]:
        """All blocks, as a loop or a scan: the last states, the images' keys by block, a LayerOutput by layer."""
        interval = self.config.cross_layer_interval
        cross = [None] * self._num_blocks if cache is None or cache.cross is None else cache.cross
        caches = [None] * self.config.num_hidden_layers if cache is None else cache.layers
        memories = [
            BlockMemory(cross[i], tuple(caches[i * interval : (i + 1) * interval])) for i in range(self._num_blocks)
        ]
        if self.scan_layers:

            def block(block: IdeficsBlock, states: Array, memory: BlockMemory) -> Any:
                return block(states, memory, context, flags)

            states, results = run_layers(self.blocks, block, states, memories, self.remat)
            images, outputs = zip(*results, strict=True)
            return states, list(images), [output for block in outputs for output in block]

        def see(layer: Any, states: Array, images: KeyValue | None) -> Any:
            return look(layer, states, images, context, flags[-1])

        def decode(layer: IdeficsDecoderLayer, states: Array, cache: KeyValue | None) -> Any:
            return layer(states, cache, context, *flags)

        images, outputs = [], []
        for i, memory in enumerate(memories):
            states, seen = run_layers(self.gated_cross_attn_layers[i : i + 1], see, states, [memory.cross], self.remat)
            layers = self.layers[i * interval : (i + 1) * interval]
            states, results = run_layers(layers, decode, states, memory.layers, self.remat)
            images += seen
            outputs += results
        return states, images, outputs

    def _images(
        self,
        batch: int,
        pixel_values: Array | None,
        image_encoder_embeddings: Array | None,
        perceiver_embeddings: Array | None,
        interpolate_pos_encoding: bool,
        deterministic: bool,
    ) -> Float[Array, "B I P E"] | None:
        """The states that text looks at, from whatever form of the images is given."""
        forms = (pixel_values, image_encoder_embeddings, perceiver_embeddings)
        given = [each for each in forms if each is not None]
        if len(given) > 1:
            raise ValueError("expected at most one of pixel_values, image_encoder_embeddings, perceiver_embeddings")
        channels = self.config.vision_config.num_channels
        if pixel_values is not None and (pixel_values.ndim != 5 or pixel_values.shape[-1] != channels):
            raise ValueError(
                f"pixel_values has shape {pixel_values.shape}: expected [batch, images, height, width, {channels}]. "
                "If it is channels-first as in PyTorch, pass pixel_values.transpose(0, 1, 3, 4, 2)"
            )
        if not given:
            return None
        (images,) = given
        number = images.shape[1]
        if images.shape[0] != batch or not number:
            raise ValueError(
                f"images have shape {images.shape}: expected {batch} rows as of text, of one image or more each; "
                "leave images out for text alone"
            )
        if perceiver_embeddings is not None:
            if not self.config.use_resampler:
                raise ValueError("If `perceiver_embeddings` are passed, use_resampler should be True")
            return images.astype(self.dtype)
        states = constrain(images.reshape(batch * number, *images.shape[2:]).astype(self.dtype), ROWS)
        if pixel_values is not None:
            states = self.vision_model(states, interpolate_pos_encoding, deterministic=deterministic).last_hidden_state
        if self.config.use_resampler:
            states = self.perceiver_resampler(states)
        return constrain(states.reshape(batch, number, *states.shape[1:]), ROWS)

    def _may_see(
        self, images: Array | None, image_attention_mask: Array | None, cache: KVCache | None, tokens: tuple[int, int]
    ) -> Bool[Array, "B T I"] | None:
        """Which images each token looks at; None where there are none."""
        remembered = None if cache is None else cache.cross_mask
        if images is not None:
            number = images.shape[1]
        elif remembered is not None:
            number = remembered.shape[-1]
            if image_attention_mask is None:
                return jnp.broadcast_to(remembered[:, None], (*tokens, number))
        elif image_attention_mask is not None:
            raise ValueError("image_attention_mask came without images, and the cache has none: give pixel_values")
        else:
            return None
        if image_attention_mask is None:
            raise ValueError("images need an image_attention_mask [batch, tokens, images]: the processor makes it")
        if image_attention_mask.shape != (*tokens, number):
            raise ValueError(
                f"image_attention_mask has shape {image_attention_mask.shape}: expected {(*tokens, number)}, "
                "[batch, tokens, images]"
            )
        return image_attention_mask != 0


class IdeficsForVisionText2Text(Tower):
    """`IdeficsModel` with a head over the vocabulary."""

    config: IdeficsConfig

    # Inputs besides ids and mask whose second axis is that of the tokens: padded with the prompt.
    token_inputs = frozenset({"image_attention_mask", "position_ids"})
    pixel_input = "pixel_values"

    def setup(self) -> None:
        config = self.config
        self.model = IdeficsModel(config, **self.run_stack)
        if not config.tie_word_embeddings:
            self.lm_head = DecoupledHead(
                config.vocab_size,
                kernel_init=nn.initializers.normal(config.initializer_range),
                kernel_axes=("embed", "vocab"),
                num_additional_features=config.additional_vocab_size,
                **self.dtypes,
            )

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        return IdeficsModel(self.config).example_inputs()

    @nn.nowrap
    def init_cache(
        self, batch_size: int, length: int, dtype: Dtype | None = None, num_images: int | None = None
    ) -> KVCache:
        """See `IdeficsModel`."""
        return IdeficsModel(self.config, dtype=self.dtype).init_cache(batch_size, length, dtype, num_images)

    def encode_images(self, pixel_values: Float[Array, "B I height width C"], **flags: bool) -> dict[str, Array]:
        """See `IdeficsModel`."""
        return self.model.encode_images(pixel_values, **flags)

    @nn.nowrap
    def empty_encodings(self, batch_size: int, num_images: int) -> dict[str, Array]:
        """See `IdeficsModel`."""
        return IdeficsModel(self.config, dtype=self.dtype).empty_encodings(batch_size, num_images)

    @nn.nowrap
    def lay_out(self, inputs: Mapping[str, np.ndarray], num_images: int) -> dict[str, np.ndarray]:
        """See `flax_vlm.generation.state`; slots are tokens."""
        laid = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        seen = inputs.get("image_attention_mask", np.zeros((*laid["input_ids"].shape, 0), np.int32))
        return laid | {"image_attention_mask": np.pad(seen, ((0, 0), (0, 0), (0, num_images - seen.shape[-1])))}

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "B T"] | Bool[Array, "B T"] | None = None,
        position_ids: Int[Array, "#B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        labels: Int[Array, "B T"] | None = None,
        vocab_chunk: int = 0,
        logits_to_keep: int | Int[Array, " K"] = 0,
        **inputs: Any,
    ) -> IdeficsCausalLMOutput:
        """
        Args:
          segment_ids: see `IdeficsModel`; the last token of a segment predicts nothing.
          labels: the ids again, -100 where a token does not count; gives `loss`.
          vocab_chunk: compute the loss over so many words at a time, and no logits; 0 for all at once.
          logits_to_keep: 0 for all logits, k for those of the last k tokens, an array for those at its indices.
          inputs: further ones of `IdeficsModel`.

        Raises:
          ValueError: for arguments that do not belong together.
        """
        output = self.model(input_ids, attention_mask, position_ids, inputs_embeds, segment_ids=segment_ids, **inputs)
        states = states_to_keep(output.last_hidden_state, logits_to_keep)
        if labels is not None and labels.shape != states.shape[:2]:
            raise ValueError(f"labels have shape {labels.shape}: logits of {states.shape[:2]} tokens were kept")
        expected = None if labels is None else (labels, attention_mask, segment_ids)
        if self.config.tie_word_embeddings:
            table = self.model.embed_tokens
            prediction = predict(states, table.attend, table.tables, expected, vocab_chunk, words_first=True)
        else:
            tables = partial(self.lm_head.kernels, states.shape[-1])
            prediction = predict(states, self.lm_head, tables, expected, vocab_chunk)
        return IdeficsCausalLMOutput(
            **prediction._asdict(),
            image_hidden_states=output.image_hidden_states,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cache=output.cache,
        )
