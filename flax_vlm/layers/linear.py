"""Matrix products that add up in float32 and round once, and the Dense layer made of them.

A bfloat16 product whose sum is also kept in bfloat16 loses half of its digits, and on a CPU it misses the fast path
(up to 20 times slower). So every product here asks for an accumulator of at least float32 (`preferred_element_type`),
adds the bias there, and is cast to the compute dtype once, as torch's kernels do.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flax_vlm.layers import quantized
from flax_vlm.layers.few_rows import FEW, Bits
from flax_vlm.layers.quantized import Quantized

Initializer: TypeAlias = Any  # (key, shape, dtype) -> array; linen has no public name for it
PRODUCT = "product"  # of what `matmul` gives: by this name `layers.stack` keeps it for the backward pass
# Of a function that is cheap to compute again: the backward pass keeps what goes in, and nothing in between.
kept_by_input = partial(jax.checkpoint, prevent_cse=False)
Axes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # of the one side and of the other


def wide(dtype: Dtype) -> Dtype:
    """The dtype for sums, norms and softmax: float32, or float64 where that is already in use."""
    return jnp.promote_types(dtype, jnp.float32)


def compute_dtype(*operands: Array | Quantized | Bits | None, dtype: Dtype | None) -> Dtype:
    """`dtype`, or where it is None the promoted dtype of the operands, of which whole numbers have no say."""
    return canonicalize_dtype(*(each for each in operands if not isinstance(each, Quantized | Bits)), dtype=dtype)


def matmul(
    inputs: Float[Array, "*B D"], kernel: Float[Array, "D F"] | Quantized | Bits, bias: Float[Array, " F"] | None = None
) -> Float[Array, "*B F"]:
    """`inputs @ kernel + bias`, accumulated in at least float32 and rounded once to the dtype of `inputs`.

    A kernel of another dtype is cast to that of `inputs`, and its gradient is never rounded to it.
    """
    if isinstance(kernel, Bits) and inputs.size > FEW * inputs.shape[-1]:
        kernel = kernel.floats()
    if isinstance(kernel, Quantized):
        out = quantized.product(inputs, kernel)
    elif isinstance(kernel, Bits):
        out = kernel.product(inputs)
    else:
        out = _float_product(inputs, kernel)
    if bias is not None:
        out += bias.astype(out.dtype)
    return checkpoint_name(out.astype(inputs.dtype), PRODUCT)


def _float_product(inputs: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    dimensions = (((inputs.ndim - 1,), (0,)), ((), ()))
    if inputs.size == inputs.shape[-1] and inputs.dtype.itemsize < 4:
        default = partial(product, dimensions=dimensions)
        return lax.platform_dependent(inputs, kernel, cpu=_product_of_one_row, default=default)
    return product(inputs, kernel, dimensions)


def _product_of_one_row(inputs: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """With a row of zeros beside it: for one row of bfloat16 alone XLA's CPU code is ten times slower than for two."""
    two_rows = jnp.pad(inputs.reshape(1, -1), ((0, 1), (0, 0)))
    return product(two_rows, kernel, (((1,), (0,)), ((), ())))[:1].reshape(*inputs.shape[:-1], -1)


def product(lhs: Array, rhs: Array, dimensions: tuple[Axes, Axes]) -> Array:
    """`lax.dot_general` in the dtype of `lhs`, with the sums in at least float32, in which it gives them.

    Backward, what comes in is rounded to that dtype first, as torch's kernels do. Otherwise a product of bfloat16 would
    have the gradients of one of float32, at a half of the speed.
    """
    if lhs.dtype.itemsize < 4:
        return _narrow_product(lhs, rhs, dimensions)
    return lax.dot_general(lhs, rhs.astype(lhs.dtype), dimensions, preferred_element_type=wide(lhs.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_product(lhs: Array, rhs: Array, dimensions: tuple[Axes, Axes]) -> Array:
    return lax.dot_general(lhs, rhs.astype(lhs.dtype), dimensions, preferred_element_type=jnp.float32)


def _narrow_product_forward(lhs: Array, rhs: Array, dimensions: tuple[Axes, Axes]) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_product(lhs, rhs, dimensions), (lhs, rhs)


def _narrow_product_backward(
    dimensions: tuple[Axes, Axes], kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    lhs, rhs = kept
    (lhs_summed, rhs_summed), (lhs_batch, rhs_batch) = dimensions
    lhs_free = [axis for axis in range(lhs.ndim) if axis not in (*lhs_summed, *lhs_batch)]
    rhs_free = [axis for axis in range(rhs.ndim) if axis not in (*rhs_summed, *rhs_batch)]
    batch = range(len(lhs_batch))
    ours = range(len(batch), len(batch) + len(lhs_free))  # of the cotangent, whose axes are batch, lhs_free, rhs_free
    theirs = range(ours.stop, cotangent.ndim)
    cotangent = cotangent.astype(lhs.dtype)
    multiply = partial(lax.dot_general, preferred_element_type=jnp.float32)
    # In this order of the operands the gradient of a kernel [D, F] needs no transpose, and runs on XLA's fast CPU path.
    of_lhs = multiply(cotangent, rhs.astype(lhs.dtype), ((theirs, rhs_free), (batch, rhs_batch)))
    of_rhs = multiply(lhs, cotangent, ((lhs_free, ours), (lhs_batch, batch)))
    pairs = list(zip(lhs_summed, rhs_summed, strict=True))
    lhs_axes = [*lhs_batch, *lhs_free, *(first for first, _ in sorted(pairs, key=lambda pair: pair[1]))]
    rhs_axes = [*rhs_batch, *(second for _, second in sorted(pairs)), *rhs_free]
    return (
        of_lhs.transpose(np.argsort(lhs_axes)).astype(lhs.dtype),
        of_rhs.transpose(np.argsort(rhs_axes)).astype(rhs.dtype),
    )


_narrow_product.defvjp(_narrow_product_forward, _narrow_product_backward)


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
        return matmul(inputs.astype(compute_dtype(inputs, kernel, bias, dtype=self.dtype)), kernel, bias)


def partitioned(init: Initializer, axes: Sequence[str | None]) -> Initializer:
    """`init` whose result carries the names `axes` of its axes: `flax_vlm.parallel.Rules` map them to a mesh."""
    return nn.with_logical_partitioning(init, tuple(axes))
