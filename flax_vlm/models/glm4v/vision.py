"""GLM-4V's image tower, EVA2-CLIP (Sun et al., arXiv:2303.15389), and the adapter that makes its patches words.

Reference: `visual.py` of THUDM/glm-4v-9b. Parameter names are the reference's, its fused `query_key_value` in three.

B batch   P patches + 1   g patches on a side   D width of the tower   N heads   W width of the decoder
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from flax_vlm.layers import kept_weights
from flax_vlm.layers.attention import attend
from flax_vlm.layers.feed_forward import MLP, activation
from flax_vlm.layers.linear import Dense, partitioned
from flax_vlm.layers.norms import LayerNorm
from flax_vlm.layers.partitioning import INNER, constrain
from flax_vlm.layers.patch_embed import PatchConv, check_images
from flax_vlm.layers.stack import make_layers, run_layers
from flax_vlm.models.base import Block, Tower
from flax_vlm.models.glm4v.config import GLM4VConfig, GLM4VVisionConfig

normal = nn.initializers.normal


class EVA2CLIPPatchEmbedding(Block):
    """Patches in raster order behind a class token, plus a learned position each."""

    config: GLM4VVisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B height width C"]) -> Float[Array, "B P D"]:
        config = self.config
        width = config.hidden_size
        patches = PatchConv(width, config.patch_size, use_bias=True, name="proj", **self.dtypes)(images)
        zeros = partitioned(nn.initializers.zeros, (None, "embed"))
        cls = self.param("cls_embedding", zeros, (1, width), self.param_dtype)
        positions = self.param(
            "position_embedding",
            partitioned(normal(1.0), (None, "embed")),
            (config.num_positions, width),
            self.param_dtype,
        )
        cls, positions = promote_dtype(cls, positions, dtype=self.dtype)
        patches = patches.reshape(len(images), -1, width)
        first = jnp.broadcast_to(cls, (len(images), 1, width))
        return jnp.concatenate([first, patches], axis=1) + positions


class EVA2CLIPAttention(Block):
    """Bidirectional self-attention with a bias on every projection."""

    config: GLM4VVisionConfig

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "B P D"], deterministic: bool = True) -> Float[Array, "B P D"]:
        config = self.config
        width, heads = config.hidden_size, config.num_heads
        shape = (*hidden_states.shape[:2], heads, width // heads)
        dense = partial(Dense, width, **self.dtypes)
        query, key, value = (
            dense(kernel_axes=("embed", "heads"), name=f"{name}_proj")(hidden_states).reshape(shape) for name in "qkv"
        )
        attended, weights = attend(
            query,
            key,
            value,
            return_weights=kept_weights.are_wanted(self),
            implementation=self.attention_implementation,
        )
        kept_weights.keep(self, weights)
        out = dense(kernel_axes=("heads", "embed"), name="dense")(attended.reshape(hidden_states.shape))
        return nn.Dropout(config.dropout_prob)(out, deterministic)


class EVA2CLIPLayer(Block):
    """`x + norm(attention(x))`, then `x + norm(mlp(x))`: the norms act on what the branches give.

    Their names say otherwise: `input_layernorm` is behind the attention, `post_attention_layernorm` behind the MLP.
    """

    config: GLM4VVisionConfig

    def setup(self) -> None:
        config = self.config
        self.attention = EVA2CLIPAttention(config, **self.run)
        self.input_layernorm = LayerNorm(config.layer_norm_eps, **self.dtypes)
        self.mlp = MLP(config.intermediate_size, config.hidden_act, **self.dtypes)
        self.post_attention_layernorm = LayerNorm(config.layer_norm_eps, **self.dtypes)

    def __call__(self, hidden_states: Float[Array, "B P D"], deterministic: bool = True) -> Float[Array, "B P D"]:
        hidden_states += self.input_layernorm(self.attention(hidden_states, deterministic))
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class EVA2CLIPTransformer(Tower):
    """The stack of layers, without a norm before or behind it."""

    config: GLM4VVisionConfig

    def setup(self) -> None:
        self.layers = make_layers(
            lambda _: EVA2CLIPLayer(self.config, **self.run), self.config.num_hidden_layers, self.scan_layers
        )

    def __call__(self, hidden_states: Float[Array, "B P D"], deterministic: bool = True) -> Float[Array, "B P D"]:
        def body(layer: EVA2CLIPLayer, states: Array, _: None) -> tuple[Array, None]:
            return layer(states, deterministic), None

        return run_layers(self.layers, body, hidden_states, [None] * self.config.num_hidden_layers, self.remat)[0]


class GLU(Block):
    """The adapter: a projection, norm and GELU, then a gated MLP. `dense_h_to_4h` is what is gated, nothing fused."""

    config: GLM4VConfig

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "B P W"]) -> Float[Array, "B P W"]:
        width, inner = self.config.hidden_size, self.config.ffn_hidden_size

        def dense(name: str, features: int, axes: tuple[str, str]) -> Dense:
            return Dense(features, use_bias=False, kernel_axes=axes, name=name, **self.dtypes)

        hidden_states = dense("linear_proj", width, ("embed", "project"))(hidden_states)
        hidden_states = LayerNorm(1e-5, name="norm1", **self.dtypes)(hidden_states)  # not the tower's layer_norm_eps
        hidden_states = activation("gelu")(hidden_states)
        gate = activation("silu")(dense("gate_proj", inner, ("embed", "mlp"))(hidden_states))
        gated = constrain(gate * dense("dense_h_to_4h", inner, ("embed", "mlp"))(hidden_states), INNER)
        return dense("dense_4h_to_h", width, ("mlp", "embed"))(gated)


class EVA2CLIPModel(Tower):
    """Images to what takes their place among the words: a learned begin, a vector for every 2 x 2 patches, an end.

    All of it, begin and end included, is divided by `scaling_factor`. Takes the config of the whole model, whose width
    it ends in.
    """

    config: GLM4VConfig

    def setup(self) -> None:
        config, vision = self.config, self.vision_config
        self.patch_embedding = EVA2CLIPPatchEmbedding(vision, **self.run)
        self.transformer = EVA2CLIPTransformer(vision, **self.run_stack)
        self.conv = PatchConv(config.hidden_size, 2, use_bias=True, **self.dtypes)
        self.linear_proj = GLU(config, **self.run)
        init = partitioned(nn.initializers.zeros, (None, None, "embed"))
        self.boi = self.param("boi", init, (1, 1, config.hidden_size), self.param_dtype)
        self.eoi = self.param("eoi", init, (1, 1, config.hidden_size), self.param_dtype)

    @property
    def vision_config(self) -> GLM4VVisionConfig:
        if self.config.vision_config is None:
            raise ValueError("this config has no vision_config: it is that of a text model, without an image tower")
        return self.config.vision_config

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        vision = self.vision_config
        return {"images": jnp.zeros((1, vision.image_size, vision.image_size, vision.in_channels))}

    def __call__(
        self, images: Float[Array, "B height width C"], deterministic: bool = True
    ) -> Float[Array, "B image_tokens W"]:
        """Raises ValueError for images that are not channels-last or not of the model's size."""
        vision = self.vision_config
        check_images(images, vision.in_channels, "images")
        if images.shape[1:3] != (vision.image_size, vision.image_size):
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels: expected {vision.image_size} x "
                f"{vision.image_size}, the only size with positions in this model: resize them first"
            )
        states = self.transformer(self.patch_embedding(images), deterministic)
        patches = states[:, 1:].reshape(len(images), vision.grid, vision.grid, -1)
        merged = self.linear_proj(self.conv(patches).reshape(len(images), vision.num_patches, -1))
        begin, end = (
            jnp.broadcast_to(each, (len(images), *each.shape[1:])).astype(merged.dtype) for each in (self.boi, self.eoi)
        )
        return jnp.concatenate([begin, merged, end], axis=1) / vision.scaling_factor
