"""AltCLIP (Chen et al., arXiv:2211.06679): an XLM-R text tower and a CLIP image tower that meet in one space.

Reference: transformers 5.23 `AltCLIPModel`. Parameter names are the reference's.

B texts   A images   T tokens   D width   E projection_dim
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from flax_vlm.layers.linear import Dense, partitioned, wide
from flax_vlm.layers.norms import LayerNorm
from flax_vlm.models.altclip.config import AltCLIPConfig, AltCLIPTextConfig, AltCLIPVisionConfig
from flax_vlm.models.altclip.roberta import AltRobertaModel
from flax_vlm.models.base import Tower
from flax_vlm.models.clip_vision import CLIPVisionTransformer
from flax_vlm.models.outputs import ModelOutput


class AltCLIPOutput(struct.PyTreeNode):
    """Embeddings and logits are in at least float32: a bfloat16 logit near 100 is only good to half a unit."""

    logits_per_image: Float[Array, "A B"]
    logits_per_text: Float[Array, "B A"]
    text_embeds: Float[Array, "B E"]
    image_embeds: Float[Array, "A E"]
    text_model_output: ModelOutput
    vision_model_output: ModelOutput | None = None
    loss: Float[Array, ""] | None = None


def contrastive_loss(logits_per_text: Float[Array, "B A"]) -> Float[Array, ""]:
    """Mean cross-entropy of texts over images and of images over texts, the pairs on the diagonal (CLIP).

    It is written over the whole batch: with the batch sharded over a mesh, jit gathers the embeddings, and the loss
    and its gradients are those of one device.

    Raises:
      ValueError: for unequal numbers of texts and images.
    """
    if logits_per_text.shape[0] != logits_per_text.shape[1]:
        texts, images = logits_per_text.shape
        raise ValueError(f"the contrastive loss pairs each text with an image: {texts} texts came with {images} images")
    logits = logits_per_text.astype(wide(logits_per_text.dtype))
    over_images = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    over_texts = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -(over_images.mean() + over_texts.mean()) / 2


class AltCLIPVisionModel(CLIPVisionTransformer):
    """The image tower alone; see `CLIPVisionTransformer`."""

    config: AltCLIPVisionConfig


class AltCLIPTextModel(Tower):
    """The text tower: XLM-R, a norm, and a projection of every token to `project_dim`.

    `pooler_output` is the first token's projection, padding or not; `hidden_states` are XLM-R's own.
    """

    config: AltCLIPTextConfig

    def setup(self) -> None:
        config = self.config
        self.roberta = AltRobertaModel(config, add_pooling_layer=False, **self.run_stack)
        self.pre_LN = LayerNorm(config.layer_norm_eps, **self.dtypes)
        init = nn.initializers.normal(config.initializer_range)
        self.transformation = Dense(
            config.project_dim, kernel_init=init, kernel_axes=("embed", "project"), **self.dtypes
        )

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        return AltRobertaModel(self.config).example_inputs()

    def __call__(self, *args: Array | None, **kwargs: Array | bool | None) -> ModelOutput:
        """Arguments and errors are those of `AltRobertaModel`."""
        output = self.roberta(*args, **kwargs)
        projected = self.transformation(self.pre_LN(output.last_hidden_state))
        return output.replace(last_hidden_state=projected, pooler_output=projected[:, 0])


class AltCLIPModel(Tower):
    """Texts and images to embeddings, and to the logits of every text against every image."""

    config: AltCLIPConfig
    pixel_input = "pixel_values"

    def setup(self) -> None:
        config = self.config
        self.text_model = AltCLIPTextModel(config.text_config, **self.run_stack)
        self.vision_model = AltCLIPVisionModel(config.vision_config, **self.run_stack)

        def projection(fan_in: int) -> Dense:
            init = nn.initializers.normal(config.initializer_factor * fan_in**-0.5)
            axes = ("embed", "project")
            return Dense(config.projection_dim, use_bias=False, kernel_init=init, kernel_axes=axes, **self.dtypes)

        self.text_projection = projection(config.text_config.project_dim)
        self.visual_projection = projection(config.vision_config.hidden_size)
        scale_init = partitioned(nn.initializers.constant(config.logit_scale_init_value), ())
        self.logit_scale = self.param("logit_scale", scale_init, (), self.param_dtype)

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        text = AltRobertaModel(self.config.text_config).example_inputs()
        return text | AltCLIPVisionModel(self.config.vision_config).example_inputs()

    def get_text_features(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "#B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B E"]:
        """The texts in the common space, not normalised."""
        output = self.text_model(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, deterministic=deterministic
        )
        return self.text_projection(_pooled(output))

    def get_image_features(
        self,
        pixel_values: Float[Array, "A height width C"],
        interpolate_pos_encoding: bool = False,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "A E"]:
        """The images in the common space, not normalised."""
        output = self.vision_model(pixel_values, interpolate_pos_encoding, deterministic=deterministic)
        return self.visual_projection(_pooled(output))

    def encode_images(
        self, pixel_values: Float[Array, "A height width C"], **flags: bool
    ) -> dict[str, Float[Array, "A E"]]:
        """`get_image_features`, by the name of the input that takes them in place of `pixel_values`."""
        return {"image_features": self.get_image_features(pixel_values, **flags)}

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        pixel_values: Float[Array, "A height width C"] | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "#B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        *,
        image_features: Float[Array, "A E"] | None = None,
        return_loss: bool = False,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> AltCLIPOutput:
        """
        Args:
          input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: see `AltRobertaModel`.
          pixel_values: channels-last.
          image_features: what `encode_images` made of them, instead; there is no `vision_model_output` then.
          return_loss: also the contrastive loss; text i belongs to image i.

        Raises:
          ValueError: for missing images or texts, or shapes that do not fit.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("expected pixel_values or image_features, one of them")
        flags: dict[str, Any] = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "deterministic": deterministic,
        }
        vision = None
        if pixel_values is not None:
            vision = self.vision_model(pixel_values, interpolate_pos_encoding, **flags)
            image_features = self.visual_projection(_pooled(vision))
        elif image_features is None:
            raise ValueError("You have to specify pixel_values; for texts alone use get_text_features")
        text = self.text_model(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **flags)
        image_embeds = _normalised(image_features)
        text_embeds = _normalised(self.text_projection(_pooled(text)))
        scale = jnp.exp(self.logit_scale.astype(text_embeds.dtype))
        logits_per_text = text_embeds @ image_embeds.T * scale
        return AltCLIPOutput(
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
            loss=contrastive_loss(logits_per_text) if return_loss else None,
        )


def _pooled(output: ModelOutput) -> Float[Array, "B D"]:
    assert output.pooler_output is not None, "both towers pool"
    return output.pooler_output


def _normalised(features: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Unit length, in at least float32."""
    features = features.astype(wide(features.dtype))
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
