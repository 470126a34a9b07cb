"""Attention on a mesh of eight devices gives what it gives on one; a process of its own runs this."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_vlm import parallel
from flax_vlm.layers import attention
from flax_vlm.layers.attention import attend, causal_mask, padding_mask
from tests.tolerances import FLOAT32_REORDERED, assert_close

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

B, T, N, H, IMAGES = 4, 24, 4, 16, 3
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(np.arange(T) >= np.array([0, 3, 5, 0])[:, None])
LOOKS = jnp.asarray(RNG.integers(0, IMAGES + 1, (B, T))[..., None] == np.arange(IMAGES))[:, None]
SEVERAL = jnp.asarray(RNG.random((B, 1, T, IMAGES)) < 0.5)


def check(implementation: Any, kv_heads: int, mask: Any, bias: Any = None) -> None:
    shapes = ((B, T, N, H), (B, T, kv_heads, H), (B, T, kv_heads, H))
    arrays = [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]

    def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, _ = attend(*qkv, mask=mask, bias=bias, implementation=implementation)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    def run() -> Any:
        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
        return out, gradients

    alone = run()
    with parallel.use(parallel.make_mesh(1, 2, 4), parallel.FSDP_TENSOR):
        spread = run()
    for one, other in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        assert_close(one, other, FLOAT32_REORDERED, f"{implementation}, {kv_heads} heads")


def main() -> None:
    attention._SMALL = 0
    check("blocked", 4, causal_mask(T, T) & padding_mask(TOKENS))
    check("blocked", 2, None, jnp.asarray(RNG.standard_normal((1, N, T, T)), jnp.float32))
    check("splash", 2, causal_mask(T, T) & padding_mask(TOKENS))  # two key/value heads in four parts
    check("splash", 4, LOOKS)
    check("splash", 4, SEVERAL)
    print("attention agrees")


if __name__ == "__main__":
    main()
