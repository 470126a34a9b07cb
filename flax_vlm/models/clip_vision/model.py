"""The CLIP image tower: patches, a pre-norm transformer, and a norm on the pooled class token only.

Reference: transformers 5.23 `AltCLIPVisionModel` and `IdeficsVisionTransformer`. Parameter names are theirs
(`pre_layrnorm` included).

B batch   P patches + 1   D hidden_size   N heads   H head width   C channels
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flax_vlm.layers.attention import attend
from flax_vlm.layers.feed_forward import MLP
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.norms import LayerNorm
from flax_vlm.layers.patch_embed import PatchEmbed, exact_scale
from flax_vlm.layers.stack import make_layers, run_layers
from flax_vlm.models.base import Block, Tower
from flax_vlm.models.clip_vision.config import CLIPVisionConfig
from flax_vlm.models.outputs import ModelOutput

normal = nn.initializers.normal


class CLIPAttention(Block):
    """Bidirectional self-attention with a bias on every projection."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(
        self, hidden_states: Float[Array, "B P D"], output_attentions: bool = False, deterministic: bool = True
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B N P P"] | None]:
        config = self.config
        width, heads = config.hidden_size, config.num_attention_heads
        dense = partial(Dense, width, **self.dtypes)
        query, key, value = (
            dense(kernel_init=normal(config.spread.attention_in), kernel_axes=("embed", "heads"), name=f"{name}_proj")(
                hidden_states
            ).reshape(*hidden_states.shape[:2], heads, width // heads)
            for name in ("q", "k", "v")
        )
        attended, weights = attend(
            query,
            key,
            value,
            dropout_rate=config.attention_dropout,
            dropout_rng=None if deterministic else self.make_rng("dropout"),
            return_weights=output_attentions,
            implementation=self.attention_implementation,
        )
        out = dense(kernel_init=normal(config.spread.attention_out), kernel_axes=("heads", "embed"), name="out_proj")
        return out(attended.reshape(hidden_states.shape)), weights


class CLIPEncoderLayer(Block):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    config: CLIPVisionConfig

    def setup(self) -> None:
        config = self.config
        self.layer_norm1 = LayerNorm(config.layer_norm_eps, **self.dtypes)
        self.self_attn = CLIPAttention(config, **self.run)
        self.layer_norm2 = LayerNorm(config.layer_norm_eps, **self.dtypes)
        self.mlp = MLP(
            config.intermediate_size,
            config.hidden_act,
            fc1_init=normal(config.spread.fc1),
            fc2_init=normal(config.spread.fc2),
            **self.dtypes,
        )

    def __call__(
        self, hidden_states: Float[Array, "B P D"], output_attentions: bool = False, deterministic: bool = True
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B N P P"] | None]:
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), output_attentions, deterministic)
        hidden_states += attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states)), weights


class CLIPEncoder(Tower):
    """The stack of layers; returns the last states and, where asked for, all of them."""

    config: CLIPVisionConfig

    def setup(self) -> None:
        self.layers = make_layers(
            lambda _: CLIPEncoderLayer(self.config, **self.run),
            self.config.num_hidden_layers,
            self.scan_layers,
        )

    def __call__(
        self,
        hidden_states: Float[Array, "B P D"],
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> ModelOutput:
        def body(layer: CLIPEncoderLayer, states: Array, _: None) -> tuple[Array, tuple[Array | None, Array | None]]:
            states, weights = layer(states, output_attentions, deterministic)
            return states, (states if output_hidden_states else None, weights)

        last, outputs = run_layers(self.layers, body, hidden_states, [None] * self.config.num_hidden_layers, self.remat)
        states, weights = zip(*outputs, strict=True)
        return ModelOutput(
            last_hidden_state=last,
            hidden_states=(hidden_states, *states) if output_hidden_states else None,
            attentions=weights if output_attentions else None,
        )


class CLIPVisionTransformer(Tower):
    """Pictures to token states [B, P, D] and a pooled state [B, D].

    `last_hidden_state` is the raw encoder output; `post_layernorm` acts on the pooled class token only.
    `position_scale` chooses the rule by which positions are interpolated at other picture sizes.
    """

    config: CLIPVisionConfig
    position_scale: Callable[[int, int], float] = exact_scale

    def setup(self) -> None:
        config = self.config
        self.embeddings = PatchEmbed(
            config.hidden_size,
            config.image_size,
            config.patch_size,
            config.num_channels,
            self.position_scale,
            class_init=normal(config.spread.class_token),
            patch_init=normal(config.spread.embeddings),
            position_init=normal(config.spread.embeddings),
            **self.dtypes,
        )
        self.pre_layrnorm = LayerNorm(config.layer_norm_eps, **self.dtypes)
        self.encoder = CLIPEncoder(config, **self.run_stack)
        self.post_layernorm = LayerNorm(config.layer_norm_eps, **self.dtypes)

    @nn.nowrap
    def example_inputs(self) -> dict[str, Array]:
        """The smallest inputs that reach every parameter."""
        size = self.config.image_size
        return {"pixel_values": jnp.zeros((1, size, size, self.config.num_channels))}

    def __call__(
        self,
        pixel_values: Float[Array, "B height width C"],
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Raises ValueError for images that are not channels-last or not of the model's size."""
        embedded = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        output = self.encoder(embedded, output_hidden_states, output_attentions, deterministic)
        return output.replace(pooler_output=self.post_layernorm(output.last_hidden_state[:, 0]))
