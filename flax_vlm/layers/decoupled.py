"""Embedding and head whose vocabulary is in two parts: a main one, and a few additional tokens (IDEFICS).

The parts are tables of their own so that the main one can stay frozen while the additional one learns.

V main vocabulary   A additional tokens   D model width
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flax_vlm.layers.embed import Embed
from flax_vlm.layers.linear import Dense, Initializer, compute_dtype, matmul, partitioned
from flax_vlm.layers.partitioning import LOGITS, constrain
from flax_vlm.layers.quantized import Quantized


class DecoupledEmbed(Embed):
    """An `Embed` of V rows for the ids below V, with an `additional_embedding` for the A ids from there on, if any.

    Ids past both give NaN rows.
    """

    num_additional_embeddings: int = 0
    additional_init: Initializer = nn.initializers.normal(1.0)

    def setup(self) -> None:
        super().setup()
        if self.num_additional_embeddings:
            self.additional_embedding = Embed(
                self.num_additional_embeddings,
                self.features,
                embedding_init=self.additional_init,
                axes=(None, "embed"),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        if not self.num_additional_embeddings:
            return super().__call__(ids)
        is_additional = ids >= self.num_embeddings
        main = super().__call__(jnp.where(is_additional, 0, ids))
        additional = self.additional_embedding(jnp.where(is_additional, ids - self.num_embeddings, 0))
        return jnp.where(is_additional[..., None], additional, main)

    def tables(self) -> tuple[Float[Array, "_ D"], ...]:
        """[V, D], and where there are additional tokens [A, D]."""
        return (self.embedding, *([self.additional_embedding.embedding] if self.num_additional_embeddings else []))

    def attend(self, states: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        """The logits, over W = V + A tokens, of a head that is tied to these tables."""
        main = super().attend(states)
        if not self.num_additional_embeddings:
            return main
        return jnp.concatenate([main, self.additional_embedding.attend(states)], axis=-1)


class DecoupledHead(Dense):
    """A `Dense` without bias to V logits, with an `additional_fc` for A more, if any."""

    use_bias: bool = False
    num_additional_features: int = 0

    @nn.compact
    def kernels(self, width: int) -> tuple[Float[Array, "D _"] | Quantized, ...]:
        """[D, V], and where there are additional tokens [D, A]; D is `width`."""
        init = partitioned(self.kernel_init, self.kernel_axes)
        kernel = self.param("kernel", init, (width, self.features), self.param_dtype)
        if not self.num_additional_features:
            return (kernel,)
        additional = DecoupledHead(
            self.num_additional_features,
            kernel_init=self.kernel_init,
            kernel_axes=(self.kernel_axes[0], None),
            param_dtype=self.param_dtype,
            name="additional_fc",
        )
        return kernel, *additional.kernels(width)

    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        kernels = self.kernels(inputs.shape[-1])
        states = inputs.astype(compute_dtype(inputs, *kernels, dtype=self.dtype))
        return jnp.concatenate([constrain(matmul(states, kernel), LOGITS) for kernel in kernels], axis=-1)
