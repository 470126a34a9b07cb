"""LayerNorm and RMSNorm, computed in at least float32 (float64 stays float64).

For the backward pass they keep their input alone, in its own dtype, and compute the rest again: less memory than the
centred and scaled values in float32, and no slower.

RMSNorm: Zhang and Sennrich, arXiv:1910.07467. LayerNorm: Ba et al., arXiv:1607.06450.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from flax_vlm.layers.linear import compute_dtype, kept_by_input, partitioned, wide


class LayerNorm(nn.Module):
    """`scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias` over the last axis, with torch's epsilon.

    The variance is that of centred values: E[x^2] - E[x]^2 cancels badly where the mean is large, which shows at
    float32 parity.
    """

    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        features = hidden_states.shape[-1:]
        scale = self.param("scale", partitioned(nn.initializers.ones, ("embed",)), features, self.param_dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("embed",)), features, self.param_dtype)
        dtype = compute_dtype(hidden_states, scale, bias, dtype=self.dtype)

        @kept_by_input
        def normed(x: Array, scale: Array, bias: Array) -> Array:
            x = x.astype(wide(dtype))
            centred = x - x.mean(-1, keepdims=True)
            variance = jnp.square(centred).mean(-1, keepdims=True)
            return (centred * (lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(dtype)

        return normed(hidden_states, scale, bias)


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis.

    `round_before_scale` rounds the normalised value to the compute dtype before it is scaled (LLaMA and IDEFICS);
    otherwise the one rounding is at the end (ChatGLM). The two differ in the last bit of bfloat16 only.
    """

    epsilon: float = 1e-6
    round_before_scale: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        dtype = self.dtype or jnp.promote_types(hidden_states.dtype, self.param_dtype)
        features = hidden_states.shape[-1:]
        scale = self.param("scale", partitioned(nn.initializers.ones, ("embed",)), features, self.param_dtype)

        @kept_by_input
        def normed(x: Array, scale: Array) -> Array:
            x = x.astype(wide(dtype))
            normed = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
            if self.round_before_scale:
                normed = normed.astype(dtype)
            return (normed * scale.astype(normed.dtype)).astype(dtype)

        return normed(hidden_states, scale)
