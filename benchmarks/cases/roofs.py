"""What the machine can do at most: products of large matrices, and sums over more than its caches hold.

The better of the contestants is the roof under which the other cases are seen.
"""

from functools import partial
from typing import Any

import numpy as np

from benchmarks import device
from benchmarks.cases import Case, Phase, Work

DTYPES = ("float32", "bfloat16")
WIDTH, NUMBERS = 4096, 630 * 10**6


def cases(quick: bool) -> list[Case]:
    width, numbers = (64, 10**6) if quick else (WIDTH, NUMBERS)
    chosen = [
        Case(
            f"roof: product of {WIDTH:,} x {WIDTH:,}, {dtype}",
            {"flax_vlm": partial(our_product, width, dtype), "torch sdpa": partial(their_product, width, dtype)},
        )
        for dtype in DTYPES
    ]
    sums = {"flax_vlm": partial(our_sum, numbers), "torch sdpa": partial(their_sum, numbers)}
    return [*chosen, Case("roof: sum of 2.5 GB, memory bandwidth", sums)]


def our_product(width: int, dtype: str) -> Work:
    import jax
    import jax.numpy as jnp

    array = jnp.ones((width, width), dtype)
    product = jax.jit(lambda array: jnp.matmul(array, array, preferred_element_type=jnp.float32))
    return Work(
        run=lambda: jax.block_until_ready(product(array)),
        as_numpy=np.asarray,
        phases=(Phase(flops=2 * width**3),),
        dtype=dtype,
    )


def their_product(width: int, dtype: str) -> Work:
    import torch

    array = torch.ones(width, width, dtype=getattr(torch, dtype), device=device.of_torch())
    return device.torch_work(lambda: array @ array)


def our_sum(numbers: int) -> Work:
    import jax
    import jax.numpy as jnp

    array = jnp.ones(numbers, jnp.float32)
    total = jax.jit(lambda array: array.reshape(8, -1).sum(-1))
    run: Any = lambda: jax.block_until_ready(total(array))  # noqa: E731
    return Work(run=run, as_numpy=np.asarray, phases=(Phase(nbytes=4 * numbers),))


def their_sum(numbers: int) -> Work:
    import torch

    array = torch.ones(numbers, device=device.of_torch())
    return device.torch_work(lambda: array.reshape(8, -1).sum(-1))
