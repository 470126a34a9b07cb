"""Activations by the names of checkpoints, and the two-layer MLP of a transformer block."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from flax_vlm.layers.linear import Dense, Initializer, kept_by_input, wide
from flax_vlm.layers.partitioning import INNER, constrain

Activation: TypeAlias = Callable[[Float[Array, "*B"]], Float[Array, "*B"]]


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The exact GELU (Hendrycks and Gimpel, arXiv:1606.08415); `jax.nn.gelu` is the tanh form unless told."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def quick_gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`x * sigmoid(1.702 x)`, the GELU of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


def activation(name: str) -> Activation:
    """The activation that checkpoints call `name`, computed in at least float32 and returned in the input's dtype.

    For the backward pass it keeps its input alone, and computes the rest again.

    Raises:
      ValueError: for a name that is not known; nothing is substituted.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(sorted(_ACTIVATIONS))}")
    function = _ACTIVATIONS[name]
    return kept_by_input(lambda x: function(x.astype(wide(x.dtype))).astype(x.dtype))


class MLP(nn.Module):
    """`fc2(act(fc1(x)))`, width D -> F -> D."""

    intermediate_size: int
    hidden_act: str
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    fc1_init: Initializer = nn.initializers.lecun_normal()
    fc2_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        def dense(features: int, name: str, init: Initializer, axes: tuple[str, str]) -> Dense:
            return Dense(
                features, kernel_init=init, kernel_axes=axes, dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )

        inner = dense(self.intermediate_size, "fc1", self.fc1_init, ("embed", "mlp"))(hidden_states)
        inner = constrain(activation(self.hidden_act)(inner), INNER)
        return dense(hidden_states.shape[-1], "fc2", self.fc2_init, ("mlp", "embed"))(inner)


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` without biases, width D -> F -> D (Shazeer, arXiv:2002.05202)."""

    intermediate_size: int
    hidden_act: str
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        def dense(features: int, name: str, axes: tuple[str, str]) -> Dense:
            return Dense(
                features,
                use_bias=False,
                kernel_init=self.kernel_init,
                kernel_axes=axes,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        gate = dense(self.intermediate_size, "gate_proj", ("embed", "mlp"))(hidden_states)
        up = dense(self.intermediate_size, "up_proj", ("embed", "mlp"))(hidden_states)
        inner = constrain(activation(self.hidden_act)(gate) * up, INNER)
        return dense(hidden_states.shape[-1], "down_proj", ("mlp", "embed"))(inner)
