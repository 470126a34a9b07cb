"""GLM-4V-9B (THUDM, June 2024): a picture takes the place of a word, and a ChatGLM4 decoder reads on.

Reference: `modeling_chatglm.py` of THUDM/glm-4v-9b. Parameter names are the reference's, but for the head, which stands
beside the model and not in it. Better than there: rows with and without pictures in one batch, batches of text that are
padded on the left, padding while training, several pictures, and pictures in later turns; `splice` says by which rule.

B batch   L ids   S slots (L, and more with pictures)   I pictures a row   P patches a picture   D hidden_size
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Num

from flax_vlm.layers.attention import Mask, causal_mask, padding_mask, segment_mask
from flax_vlm.layers.decoupled import DecoupledHead
from flax_vlm.layers.embed import Embed
from flax_vlm.layers.kv_cache import KVCache
from flax_vlm.layers.losses import IGNORED
from flax_vlm.layers.partitioning import ROWS, constrain
from flax_vlm.layers.rotary import rotation
from flax_vlm.layers.segments import check_segments, count_positions
from flax_vlm.models.base import Block, Tower
from flax_vlm.models.decoder import Context, predict
from flax_vlm.models.glm4v.config import GLM4VConfig
from flax_vlm.models.glm4v.decoder import ChatGLMTransformer
from flax_vlm.models.glm4v.splice import NO_VECTOR, Slots, check_pictures, lay_out, splice
from flax_vlm.models.glm4v.vision import EVA2CLIPModel
from flax_vlm.models.outputs import states_to_keep


class GLM4VOutput(struct.PyTreeNode):
    """States of the decoder.

    Attributes:
      attention_mask: which slots hold a token or a patch.
      segment_ids: of the slots, where the ids came with them.
      slots: what each slot holds, where pictures came; None where slots are the ids'.
      image_hidden_states: the pictures as they stand among the words.
      hidden_states: the first entry is the embedding output, the last that of the last layer, before the final norm.
    """

    last_hidden_state: Float[Array, "B S D"]
    attention_mask: Bool[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None = None
    slots: Slots | None = None
    image_hidden_states: Float[Array, "B I P D"] | None = None
    hidden_states: tuple[Float[Array, "B S D"], ...] | None = None
    attentions: tuple[Float[Array, "B N S K"], ...] | None = None
    cache: KVCache | None = None


class GLM4VCausalLMOutput(struct.PyTreeNode):
    """Logits, and what `GLM4VOutput` holds. `loss` is the mean over the `loss_weight` tokens that count."""

    logits: Float[Array, "B S V"] | None = None
    loss: Float[Array, ""] | None = None
    loss_weight: Float[Array, ""] | None = None
    slots: Slots | None = None
    image_hidden_states: Float[Array, "B I P D"] | None = None
    hidden_states: tuple[Float[Array, "B S D"], ...] | None = None
    attentions: tuple[Float[Array, "B N S K"], ...] | None = None
    cache: KVCache | None = None


class GLM4VEmbedding(Block):
    """The words."""

    config: GLM4VConfig

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.word_embeddings = Embed(config.padded_vocab_size, config.hidden_size, embedding_init=init, **self.dtypes)

    def __call__(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.word_embeddings(input_ids)


class GLM4VModel(Tower):
    """Ids and images to states [B, S, D]; the decoder alone where the config has no `vision_config`."""

    config: GLM4VConfig
    pixel_input = "images"

    def setup(self) -> None:
        self.embedding = GLM4VEmbedding(self.config, **self.run)
        self.encoder = ChatGLMTransformer(self.config, **self.run_stack)
        if self.config.vision_config is not None:
            self.vision = EVA2CLIPModel(self.config, **self.run_stack)

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        config = self.config
        if config.vision_config is None:
            return {"input_ids": jnp.zeros((1, 1), jnp.int32)}
        ids = jnp.array([[config.boi_token_id, 0, config.eoi_token_id]], jnp.int32)
        return {"input_ids": ids, **EVA2CLIPModel(config).example_inputs()}

    @nn.nowrap
    def init_cache(
        self, batch_size: int, length: int, dtype: Dtype | None = None, num_images: int | None = None
    ) -> KVCache:
        """An empty cache of `length` slots a row, P + 2 of them for a picture; or of so many ids and `num_images`."""
        config = self.config
        length += config.more_slots * (num_images or 0)
        heads = [config.multi_query_group_num] * config.num_layers
        cache = KVCache.create(batch_size, length, heads, config.kv_channels, dtype or self.dtype)
        return cache.replace(positions=jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self,
        input_ids: Int[Array, "B L"] | None = None,
        attention_mask: Num[Array, "B L"] | Bool[Array, "B L"] | None = None,
        position_ids: Int[Array, "#B L"] | None = None,
        inputs_embeds: Float[Array, "B L D"] | None = None,
        *,
        images: Float[Array, "B *I height width C"] | None = None,
        image_embeds: Float[Array, "B I P D"] | None = None,
        image_slots: Int[Array, "B L"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> GLM4VOutput:
        """
        Args:
          attention_mask: nonzero = a token, zero = padding; all tokens when absent. With a cache it speaks of the new
            tokens (the cache remembers the others).
          position_ids: of the ids, of which a picture's patches share one; counted over the tokens that are no padding,
            in each segment anew, when absent.
          inputs_embeds: what stands in the slots, pictures included; mask and positions are then those of the slots.
          images: [B, height, width, C], or several a row, [B, I, height, width, C]; channels-last. Each stands where
            the ids begin, placeholder, end are, in their order; a row that names fewer leaves its last ones unused.
          image_embeds: what `encode_images` made of them, instead.
          image_slots: where the ids are those of slots already: which vector of `image_embeds` stands there, or -1.
          segment_ids: the document of each id, where a row holds several: 1, 2 ..., and 0 for padding.

        Raises:
          ValueError: for arguments that do not belong together, and for positions from `seq_length` on. Under jit the
            values of ids and positions are unknown: a row whose ids do not fit its images is NaN then.
        """
        if input_ids is not None and inputs_embeds is None:
            embedded = self.embedding(input_ids)
        elif inputs_embeds is not None and input_ids is None and images is None and image_embeds is None:
            embedded = inputs_embeds.astype(self.dtype)
        else:
            raise ValueError("expected input_ids, with images or without, or else inputs_embeds with them inside")
        tokens = embedded.shape[:2]
        is_token = jnp.ones(tokens, bool) if attention_mask is None else attention_mask != 0
        if is_token.shape != tokens:
            raise ValueError(
                f"attention_mask has shape {is_token.shape}: expected {tokens}, with a cache of the new tokens only"
            )
        if segment_ids is not None:
            check_segments(segment_ids, tokens, cache is not None)
            is_token &= segment_ids != 0
        past = jnp.zeros(tokens[:1], jnp.int32) if cache is None else cache.next_position
        if position_ids is None:
            position_ids = jnp.where(is_token, past[:, None] + count_positions(is_token, segment_ids), 0)
        position_ids = jnp.broadcast_to(position_ids, tokens)
        self._check_positions(position_ids)
        next_position = jnp.maximum(past, jnp.where(is_token, position_ids + 1, 0).max(-1, initial=0))

        slots = vectors = None
        if images is not None and image_embeds is not None:
            raise ValueError("expected at most one of images and image_embeds")
        if image_slots is not None and image_embeds is not None:
            embedded = _place(image_embeds.astype(self.dtype), image_slots, embedded)
        elif image_slots is not None:
            raise ValueError("image_slots say where image_embeds stand: give both")
        elif input_ids is not None and (images is not None or image_embeds is not None):
            vectors = self._see(images, image_embeds, input_ids, is_token, deterministic)
            embedded, slots = self._put(vectors, embedded, input_ids, is_token)
            position_ids = slots.spread(position_ids)
            is_token = slots.spread(is_token) & slots.is_there
            segment_ids = None if segment_ids is None else slots.spread(segment_ids)

        length = embedded.shape[1]
        own = padding_mask(is_token) if segment_ids is None else segment_mask(jnp.where(is_token, segment_ids, 0))
        mask: Mask = own & causal_mask(length, length)
        if cache is not None:
            cache = cache.admit(is_token)
            mask = cache.mask(length)
        turned = self.config.kv_channels // 2
        context = Context(
            mask=mask,
            rotation=rotation(position_ids, turned, self.config.rope_theta, self.dtype),
            index=0 if cache is None else cache.index,
        )
        states, outputs = self.encoder(embedded, cache, context, output_hidden_states, output_attentions, deterministic)
        if cache is not None:
            cache = cache.advance(length, [output.cache for output in outputs]).replace(positions=next_position)
        return GLM4VOutput(
            last_hidden_state=states,
            attention_mask=is_token,
            segment_ids=segment_ids,
            slots=slots,
            image_hidden_states=vectors,
            hidden_states=(embedded, *(output.hidden_states for output in outputs)) if output_hidden_states else None,
            attentions=tuple(output.attentions for output in outputs) if output_attentions else None,
            cache=cache,
        )

    def _check_positions(self, position_ids: Array) -> None:
        """The reference has a table of as many positions."""
        if not isinstance(position_ids, Tracer) and position_ids.size:
            last = int(position_ids.max())
            if last >= self.config.seq_length:
                raise ValueError(
                    f"a token is at position {last}: expected less than seq_length, {self.config.seq_length}. Shorten "
                    "the prompt, or generate fewer tokens"
                )

    def _see(
        self, images: Array | None, encoded: Array | None, input_ids: Array, is_token: Array, deterministic: bool
    ) -> Float[Array, "B I P D"]:
        """The vectors of all pictures, if they fit the ids."""
        config, batch = self.config, len(input_ids)
        given = encoded if images is None else images
        assert given is not None
        if config.vision_config is None:
            raise ValueError("images came, and this is a text model: its config has no vision_config")
        if given.ndim not in (4, 5) or len(given) != batch or not given.size:
            raise ValueError(
                f"images have shape {given.shape}: expected [{batch}, height, width, channels], or [{batch}, pictures "
                "of a row, height, width, channels]. Rows of text alone need pictures too, of zeros say; leave images "
                "out where no row has any"
            )
        if not isinstance(input_ids, Tracer) and not isinstance(is_token, Tracer):
            check_pictures(
                np.asarray(input_ids), np.asarray(is_token), *config.picture_ids, _pictures_a_row(images, encoded)
            )
        return self._encode(given, deterministic) if encoded is None else encoded.astype(self.dtype)

    def _encode(self, images: Array, deterministic: bool) -> Float[Array, "B I P D"]:
        batch = len(images)
        vectors = self.vision(constrain(images.reshape(-1, *images.shape[-3:]), ROWS), deterministic)
        return constrain(vectors.reshape(batch, -1, *vectors.shape[1:]), ROWS)

    def encode_images(
        self, images: Float[Array, "B *I height width C"], *, deterministic: bool = True
    ) -> dict[str, Float[Array, "B I P D"]]:
        """The vectors that take the pictures' places, by the name of the input that takes them."""
        return {"image_embeds": self._encode(images, deterministic)}

    @nn.nowrap
    def empty_encodings(self, batch_size: int, num_images: int) -> dict[str, Float[Array, "B I P D"]]:
        """Those of no picture; nothing for a model of text."""
        config = self.config
        if config.vision_config is None:
            return {}
        shape = (batch_size, num_images, config.vision_config.num_patches + 2, config.hidden_size)
        return {"image_embeds": jnp.zeros(shape, self.dtype)}

    def _put(
        self, vectors: Array, words: Array, input_ids: Array, is_token: Array
    ) -> tuple[Float[Array, "B S D"], Slots]:
        """The vectors of pictures in their places among the words."""
        slots = splice(input_ids, is_token, *self.config.picture_ids, vectors.shape[1], vectors.shape[2] - 2)
        put = _place(vectors, jnp.where(slots.is_picture, slots.vector, NO_VECTOR), slots.spread(words))
        return jnp.where(slots.fits[:, None, None], put, jnp.nan), slots


def _place(
    vectors: Float[Array, "B I P D"], which: Int[Array, "B S"], words: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    """The words, and the vectors of pictures where `which` names one."""
    flat = vectors.reshape(len(words), -1, words.shape[-1])
    seen = jnp.take_along_axis(flat, which[..., None], axis=1, mode="clip")
    return jnp.where((which != NO_VECTOR)[..., None], seen, words)


def _pictures_a_row(images: Any, encoded: Any) -> int:
    if images is None:
        return 0 if encoded is None else encoded.shape[1]
    return images.shape[1] if images.ndim == 5 else 1


class GLM4VForConditionalGeneration(Tower):
    """`GLM4VModel` with a head over the vocabulary."""

    config: GLM4VConfig

    # Inputs besides ids and mask whose second axis is that of the tokens: padded with the prompt.
    token_inputs = frozenset({"position_ids", "image_slots"})
    pixel_input = "images"

    def setup(self) -> None:
        config = self.config
        self.transformer = GLM4VModel(config, **self.run_stack)
        self.output_layer = DecoupledHead(
            config.padded_vocab_size,
            kernel_init=nn.initializers.normal(config.initializer_range),
            kernel_axes=("embed", "vocab"),
            **self.dtypes,
        )

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        return GLM4VModel(self.config).example_inputs()

    @nn.nowrap
    def init_cache(
        self, batch_size: int, length: int, dtype: Dtype | None = None, num_images: int | None = None
    ) -> KVCache:
        """See `GLM4VModel`."""
        return GLM4VModel(self.config, dtype=self.dtype).init_cache(batch_size, length, dtype, num_images)

    def encode_images(self, images: Float[Array, "B *I height width C"], **flags: bool) -> dict[str, Array]:
        """See `GLM4VModel`."""
        return self.transformer.encode_images(images, **flags)

    @nn.nowrap
    def empty_encodings(self, batch_size: int, num_images: int) -> dict[str, Array]:
        """See `GLM4VModel`."""
        return GLM4VModel(self.config, dtype=self.dtype).empty_encodings(batch_size, num_images)

    @nn.nowrap
    def lay_out(self, inputs: Mapping[str, np.ndarray], num_images: int) -> dict[str, np.ndarray]:
        """See `flax_vlm.generation.state`."""
        config, ids, mask = self.config, inputs["input_ids"], inputs["attention_mask"]
        if config.vision_config is None:
            return {"input_ids": ids, "attention_mask": mask}
        check_pictures(ids, mask, *config.picture_ids, num_images)
        return lay_out(ids, mask, *config.picture_ids, config.vision_config.num_patches)

    @nn.nowrap
    def extra_slots(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, inputs: Mapping[str, Any], positions: int
    ) -> int:
        """See `flax_vlm.generation.state`."""
        config = self.config
        if positions > config.seq_length:
            raise ValueError(
                f"prompt and new tokens need {positions} positions: expected at most seq_length, {config.seq_length}. "
                "Shorten the prompt, or pass a smaller max_new_tokens"
            )
        if config.vision_config is None or "image_slots" in inputs:
            return 0
        number = _pictures_a_row(inputs.get("images"), inputs.get("image_embeds"))
        check_pictures(input_ids, attention_mask, *config.picture_ids, number)
        return number * config.more_slots

    def __call__(
        self,
        input_ids: Int[Array, "B L"] | None = None,
        attention_mask: Num[Array, "B L"] | Bool[Array, "B L"] | None = None,
        position_ids: Int[Array, "#B L"] | None = None,
        inputs_embeds: Float[Array, "B L D"] | None = None,
        *,
        labels: Int[Array, "B L"] | None = None,
        vocab_chunk: int = 0,
        logits_to_keep: int | Int[Array, " K"] = 0,
        **inputs: Any,
    ) -> GLM4VCausalLMOutput:
        """
        Args:
          labels: the ids again, -100 where a token does not count; gives `loss`. Patches, padding, and what would be
            said by padding never count.
          vocab_chunk: compute the loss over so many words at a time, and no logits; 0 for all at once.
          logits_to_keep: 0 for all logits, k for those of the last k slots, an array for those at its indices.
          inputs: further ones of `GLM4VModel`.

        Raises:
          ValueError: for arguments that do not belong together.
        """
        output = self.transformer(input_ids, attention_mask, position_ids, inputs_embeds, **inputs)
        states = states_to_keep(output.last_hidden_state, logits_to_keep)
        expected = None
        if labels is not None:
            given = (input_ids if input_ids is not None else states).shape[:2]
            if labels.shape != given or states.shape != output.last_hidden_state.shape:
                raise ValueError(f"labels have shape {labels.shape}: expected {given} as the ids, and all logits kept")
            spread = labels if output.slots is None else output.slots.labels(labels)
            behind_padding = jnp.pad(~output.attention_mask[:, :-1], ((0, 0), (1, 0)))
            expected = (jnp.where(behind_padding, IGNORED, spread), output.attention_mask, output.segment_ids)
        tables = partial(self.output_layer.kernels, states.shape[-1])
        prediction = predict(states, self.output_layer, tables, expected, vocab_chunk)
        return GLM4VCausalLMOutput(
            **prediction._asdict(),
            slots=output.slots,
            image_hidden_states=output.image_hidden_states,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cache=output.cache,
        )


class GLM4VForCausalLM(GLM4VForConditionalGeneration):
    """The text model alone, which can be taken out of the whole: its config has no `vision_config`."""

    left_out = ("transformer/vision/",)  # parameters of the whole that it does without

    @staticmethod
    def config_from(config: GLM4VConfig) -> GLM4VConfig:
        """That of the text model, from that of the whole."""
        return replace(config, vision_config=None)
