"""Gated cross-attention: text looks at images and learns how much to take (Flamingo, arXiv:2204.14198, 3.1.2).

B batch   T text tokens   I images   S image tokens, I * P   D model width   E image width   N heads   H head width
"""

from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from flax_vlm.layers import kept_weights
from flax_vlm.layers.attention import Implementation, attend
from flax_vlm.layers.feed_forward import GatedMLP
from flax_vlm.layers.kv_cache import KeyValue
from flax_vlm.layers.linear import Dense, Initializer, partitioned
from flax_vlm.layers.norms import RMSNorm

AlphaType: TypeAlias = Literal["float", "vector"]
AlphaInitializer: TypeAlias = Literal["zeros", "ones", "normal", "gaussian", "random"]


def alpha_init(name: AlphaInitializer, stddev: float) -> Initializer:
    """How the gates start: zeros (images count for nothing yet), ones, or normal under any of its three names."""
    if name not in get_args(AlphaInitializer):
        raise ValueError(f"unknown alpha initializer {name!r}: expected one of {', '.join(get_args(AlphaInitializer))}")
    return {"zeros": nn.initializers.zeros, "ones": nn.initializers.ones}.get(name, nn.initializers.normal(stddev))


class CrossAttention(nn.Module):
    """Queries from text, keys and values from images; optionally an RMSNorm over each head of queries and keys."""

    num_heads: int
    hidden_size: int
    qk_layer_norms: bool
    rms_norm_eps: float
    dropout: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    attention_implementation: Implementation = "auto"

    def setup(self) -> None:
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def dense(axes: tuple[str, str]) -> Dense:
            return Dense(self.hidden_size, use_bias=False, kernel_init=self.kernel_init, kernel_axes=axes, **dtypes)

        self.q_proj, self.o_proj = dense(("embed", "heads")), dense(("heads", "embed"))
        self.k_proj, self.v_proj = (dense(("embed", "heads")) for _ in range(2))
        if self.qk_layer_norms:
            self.q_layer_norm, self.k_layer_norm = (RMSNorm(self.rms_norm_eps, **dtypes) for _ in range(2))

    def project(self, image_states: Float[Array, "B S E"]) -> KeyValue:
        """Keys and values of the images, [B, S, N, H] each: computed once, however long the text becomes."""
        key, value = (self._heads(dense(image_states)) for dense in (self.k_proj, self.v_proj))
        return KeyValue(self.k_layer_norm(key) if self.qk_layer_norms else key, value)

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        images: KeyValue,
        may_attend: Bool[Array, "B T I"],
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        query = self._heads(self.q_proj(hidden_states))
        attended, weights = attend(
            self.q_layer_norm(query) if self.qk_layer_norms else query,
            images.key.astype(query.dtype),
            images.value.astype(query.dtype),
            mask=may_attend[:, None],
            dropout_rate=self.dropout,
            dropout_rng=None if deterministic else self.make_rng("dropout"),
            return_weights=kept_weights.are_wanted(self),
            implementation=self.attention_implementation,
        )
        kept_weights.keep(self, weights)
        return self.o_proj(attended.reshape(hidden_states.shape))

    def _heads(self, states: Float[Array, "B L D"]) -> Float[Array, "B L N H"]:
        return states.reshape(*states.shape[:2], self.num_heads, -1)


class GatedCrossAttention(nn.Module):
    """One Flamingo block in front of a decoder layer; transformers' IdeficsGatedCrossAttentionLayer.

    A token that may attend no image takes exactly zero from the attention; the gated MLP still runs for it.
    """

    num_heads: int
    hidden_size: int
    intermediate_size: int
    hidden_act: str
    alpha_type: AlphaType
    alpha_init: Initializer
    qk_layer_norms: bool
    rms_norm_eps: float
    dropout: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    attention_implementation: Implementation = "auto"

    def setup(self) -> None:
        if self.alpha_type not in get_args(AlphaType):
            raise ValueError(
                f"unknown alpha type {self.alpha_type!r}: expected one of {', '.join(get_args(AlphaType))}"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.cross_attn = CrossAttention(
            self.num_heads,
            self.hidden_size,
            self.qk_layer_norms,
            self.rms_norm_eps,
            dropout=self.dropout,
            kernel_init=self.kernel_init,
            attention_implementation=self.attention_implementation,
            **dtypes,
        )
        self.mlp = GatedMLP(self.intermediate_size, self.hidden_act, kernel_init=self.kernel_init, **dtypes)
        self.input_layernorm = RMSNorm(self.rms_norm_eps, **dtypes)
        self.post_attention_layernorm = RMSNorm(self.rms_norm_eps, **dtypes)
        self.residual_dropout = nn.Dropout(self.dropout)
        shape, axes = (
            ((1,), (None,)) if self.alpha_type == "float" else ((1, 1, self.hidden_size), (None, None, "embed"))
        )
        init = partitioned(self.alpha_init, axes)
        self.alpha_cross_attn = self.param("alpha_cross_attn", init, shape, self.param_dtype)
        self.alpha_dense = self.param("alpha_dense", init, shape, self.param_dtype)

    def project(self, image_states: Float[Array, "B S E"]) -> KeyValue:
        """Keys and values of the images."""
        return self.cross_attn.project(image_states)

    def __call__(
        self,
        hidden_states: Float[Array, "B T D"],
        images: KeyValue | None,
        may_attend: Bool[Array, "B T I"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """`images` from `project`; None where there are none."""
        if images is not None and may_attend is not None:
            attended = self.cross_attn(self.input_layernorm(hidden_states), images, may_attend, deterministic)
            attended = self.residual_dropout(attended, deterministic)
            attended = jnp.where(may_attend.any(-1)[..., None], attended, 0)
            hidden_states += jnp.tanh(self.alpha_cross_attn).astype(attended.dtype) * attended
        inner = self.residual_dropout(self.mlp(self.post_attention_layernorm(hidden_states)), deterministic)
        return hidden_states + jnp.tanh(self.alpha_dense).astype(inner.dtype) * inner
