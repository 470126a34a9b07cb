"""Token tables whose padding row takes no gradient (torch nn.Embedding with padding_idx)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from flax_vlm.layers.linear import Initializer, compute_dtype, matmul, partitioned
from flax_vlm.layers.partitioning import LOGITS, constrain
from flax_vlm.layers.quantized import Quantized


class Embed(nn.Module):
    """A table [V, D] looked up by id.

    The row `padding_idx` is read like any other but never learns, even where padding is attended. Ids outside the
    table give NaN rows rather than a silently clamped one.
    """

    num_embeddings: int
    features: int
    padding_idx: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(1.0)
    axes: tuple[str | None, str | None] = ("vocab", "embed")

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", partitioned(self.embedding_init, self.axes), shape, self.param_dtype)

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        rows = self._rows(ids)
        if self.padding_idx is None:
            return rows
        return jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(rows), rows)

    def _rows(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        if isinstance(self.embedding, Quantized):
            return self.embedding.rows(ids, self.dtype or jnp.float32)
        (table,) = promote_dtype(self.embedding, dtype=self.dtype)
        # Rows are whole where they are read: of split ones the compiler would bring all of the batch to every device.
        table = constrain(table, (self.axes[0], None))
        return table.at[ids].get(mode="fill", fill_value=jnp.nan)

    def attend(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The logits of a head that is tied to this table."""
        states = states.astype(compute_dtype(states, self.embedding, dtype=self.dtype))
        return constrain(matmul(states, self.embedding.T), LOGITS)
