"""The perceiver resampler: any number of image tokens to a fixed number of latents (Flamingo, arXiv:2204.14198, 3.1.1).

B pictures   P image tokens   L latents   E image width   N heads   H head width
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float

from flax_vlm.layers import kept_weights
from flax_vlm.layers.attention import Implementation, attend
from flax_vlm.layers.linear import Dense, Initializer, partitioned
from flax_vlm.layers.norms import LayerNorm
from flax_vlm.layers.partitioning import INNER, constrain
from flax_vlm.layers.stack import Remat, run_layers


class _Part(nn.Module):
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    def dense(self, features: int, axes: tuple[str, str], name: str | None = None) -> Dense:
        init, dtypes = self.kernel_init, self.dtypes
        return Dense(features, use_bias=False, kernel_init=init, kernel_axes=axes, name=name, **dtypes)

    @property
    def dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class PerceiverAttention(_Part, kw_only=True):
    """Latents attend the picture and themselves; keys and values come from both, the picture first."""

    num_heads: int
    head_dim: int
    qk_layer_norms: bool
    attention_implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, context: Float[Array, "B P E"], latents: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        context = LayerNorm(name="context_layer_norm", **self.dtypes)(context)
        latents = LayerNorm(name="latents_layer_norm", **self.dtypes)(latents)
        both = jnp.concatenate([context, latents], axis=1)

        def heads(states: Array, name: str, norm: bool) -> Float[Array, "B S N H"]:
            width = self.num_heads * self.head_dim
            states = self.dense(width, ("embed", "heads"), f"{name}_proj")(states)
            states = states.reshape(*states.shape[:2], self.num_heads, self.head_dim)
            return LayerNorm(name=f"{name}_layer_norm", **self.dtypes)(states) if norm else states

        query = heads(latents, "q", self.qk_layer_norms)
        key = heads(both, "k", self.qk_layer_norms)
        attended, weights = attend(
            query,
            key,
            heads(both, "v", False),
            return_weights=kept_weights.are_wanted(self),
            implementation=self.attention_implementation,
        )
        kept_weights.keep(self, weights)
        flat = attended.reshape(*attended.shape[:2], self.num_heads * self.head_dim)
        return self.dense(latents.shape[-1], ("heads", "embed"), "output_proj")(flat)


class PerceiverMLP(_Part):
    """`c_proj(relu(fc(norm(x))))`, four times as wide inside."""

    @nn.compact
    def __call__(self, latents: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        width = latents.shape[-1]
        normed = LayerNorm(name="ln", **self.dtypes)(latents)
        inner = constrain(nn.relu(self.dense(4 * width, ("embed", "mlp"), "fc")(normed)), INNER)
        return self.dense(width, ("mlp", "embed"), "c_proj")(inner)


class PerceiverBlock(_Part, kw_only=True):
    """Attention, then MLP, each added to the latents."""

    num_heads: int
    head_dim: int
    qk_layer_norms: bool
    attention_implementation: Implementation = "auto"

    def setup(self) -> None:
        self.attn = PerceiverAttention(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            qk_layer_norms=self.qk_layer_norms,
            kernel_init=self.kernel_init,
            attention_implementation=self.attention_implementation,
            **self.dtypes,
        )
        self.mlp = PerceiverMLP(kernel_init=self.kernel_init, **self.dtypes)

    def __call__(self, context: Float[Array, "B P E"], latents: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        latents += self.attn(context, latents)
        return latents + self.mlp(latents)


class PerceiverResampler(_Part, kw_only=True):
    """`depth` blocks and a norm over learned latents; transformers' IdeficsPerceiverResampler."""

    embed_dim: int
    depth: int
    num_heads: int
    head_dim: int
    num_latents: int
    qk_layer_norms: bool
    attention_implementation: Implementation = "auto"
    remat: Remat = "none"

    def setup(self) -> None:
        latents_init = partitioned(nn.initializers.normal(1.0), (None, "embed"))
        self.latents = self.param("latents", latents_init, (self.num_latents, self.embed_dim), self.param_dtype)
        self.blocks = [
            PerceiverBlock(
                num_heads=self.num_heads,
                head_dim=self.head_dim,
                qk_layer_norms=self.qk_layer_norms,
                kernel_init=self.kernel_init,
                attention_implementation=self.attention_implementation,
                **self.dtypes,
            )
            for _ in range(self.depth)
        ]
        self.layer_norm = LayerNorm(**self.dtypes)

    def __call__(self, context: Float[Array, "B P E"]) -> Float[Array, "B L E"]:
        context, latents = promote_dtype(context, self.latents, dtype=self.dtype)
        latents = jnp.broadcast_to(latents, (context.shape[0], *latents.shape))

        def body(block: PerceiverBlock, latents: Array, _: None) -> tuple[Array, None]:
            return block(context, latents), None

        latents, _ = run_layers(self.blocks, body, latents, [None] * self.depth, self.remat)
        return self.layer_norm(latents)
