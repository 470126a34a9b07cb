"""LayerNorm and RMSNorm, computed in at least float32 (float64 stays float64).

RMSNorm: Zhang and Sennrich, arXiv:1910.07467. LayerNorm: Ba et al., arXiv:1607.06450.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from flax_vlm.layers.linear import Initializer, partitioned, wide


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with torch's defaults: eps 1e-5, and the variance of centred values.

    Linen's faster E[x^2] - E[x]^2 cancels badly where the mean is large, which shows at float32 parity.
    """

    epsilon: float = 1e-5
    use_fast_variance: bool = False
    scale_init: Initializer = partitioned(nn.initializers.ones, ("embed",))
    bias_init: Initializer = partitioned(nn.initializers.zeros, ("embed",))


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
        features = hidden_states.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones, ("embed",)), (features,), self.param_dtype)
        x = hidden_states.astype(wide(dtype))
        normed = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        if self.round_before_scale:
            normed = normed.astype(dtype)
        return (normed * scale.astype(normed.dtype)).astype(dtype)
