"""Matrix products that add up in float32 and round once, and the Dense layer made of them.

A bfloat16 product whose sum is also kept in bfloat16 loses half of its digits, and on a CPU it misses the fast path
(up to 20 times slower). So every product here asks for an accumulator of at least float32 (`preferred_element_type`),
adds the bias there, and is cast to the compute dtype once, as torch's kernels do.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

Initializer: TypeAlias = Any  # (key, shape, dtype) -> array; linen has no public name for it


def wide(dtype: Dtype) -> Dtype:
    """The dtype for sums, norms and softmax: float32, or float64 where that is already in use."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul(
    inputs: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"] | None = None
) -> Float[Array, "*B F"]:
    """`inputs @ kernel + bias`, accumulated in at least float32 and rounded once to the dtype of `inputs`."""
    if inputs.size == inputs.shape[-1] and inputs.dtype.itemsize < 4:
        product = lax.platform_dependent(inputs, kernel, cpu=_product_of_one_row, default=_product)
    else:
        product = _product(inputs, kernel)
    if bias is not None:
        product += bias.astype(product.dtype)
    return product.astype(inputs.dtype)


def _product(inputs: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    contract_last = (((inputs.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(inputs, kernel, contract_last, preferred_element_type=wide(inputs.dtype))


def _product_of_one_row(inputs: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """With a row of zeros beside it: for one row of bfloat16 alone XLA's CPU code is ten times slower than for two."""
    two_rows = jnp.pad(inputs.reshape(1, -1), ((0, 1), (0, 0)))
    return _product(two_rows, kernel)[:1].reshape(*inputs.shape[:-1], -1)


class Dense(nn.Dense):
    """`nn.Dense` over the last axis through `matmul`; `kernel_axes` are the logical axis names of the kernel.

    `dtype` None keeps the promoted dtype of input and parameters, as in linen.
    """

    kernel_axes: tuple[str | None, str | None] = (None, None)

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(self.kernel_init, self.kernel_axes), shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias_init = partitioned(self.bias_init, self.kernel_axes[1:])
            bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return matmul(inputs, kernel, bias)


def partitioned(init: Initializer, axes: Sequence[str | None]) -> Initializer:
    """`init` whose result carries the logical axis names `axes` (a rules table maps them to a mesh)."""
    return nn.with_logical_partitioning(init, tuple(axes))
