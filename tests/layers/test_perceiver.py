"""The perceiver resampler; tests/parity compares it with the original."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.layers.perceiver import PerceiverResampler
from tests.tolerances import FLOAT64, assert_close, assert_gradients_close

L, E = 5, 12
RECOMPUTED = {"none": 0, "full": 2}  # blocks
CONTEXT = np.random.default_rng(0).standard_normal((3, 8, E))


def resampler(norms: bool = True) -> tuple[PerceiverResampler, Any]:
    layer = PerceiverResampler(
        embed_dim=E,
        depth=2,
        num_heads=3,
        head_dim=7,
        num_latents=L,
        qk_layer_norms=norms,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
    )
    return layer, nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), jnp.asarray(CONTEXT)))


def test_any_number_of_tokens_becomes_as_many_latents(x64: None) -> None:
    layer, params = resampler()
    apply = jax.jit(layer.apply)
    out = apply(params, jnp.asarray(CONTEXT))
    assert out.shape == (3, L, E) and apply(params, jnp.asarray(CONTEXT[:, :1])).shape == (3, L, E)
    # Tokens carry their positions themselves: here, their order is none.
    assert_close(apply(params, jnp.asarray(CONTEXT[:, ::-1])), out, FLOAT64)
    # One picture does not see another.
    assert_close(apply(params, jnp.asarray(CONTEXT[:1])), out[:1], FLOAT64)


def test_norms_of_queries_and_keys_are_optional(x64: None) -> None:
    paths = [set(flatten_params(resampler(norms)[1]["params"])) for norms in (False, True)]
    parts = {"scale", "bias"}
    extra = {f"blocks_{i}/attn/{n}_layer_norm/{part}" for i in range(2) for n in "qk" for part in parts}
    assert paths[1] - paths[0] == extra and not paths[0] - paths[1]
    layer, params = resampler()
    one, other = (jax.jit(layer.apply)(params, scale * jnp.asarray(CONTEXT)) for scale in (1, 1000))
    assert_close(other, one, 1e-4)  # what is normed has no scale, but for epsilon


def test_recomputation_changes_no_gradient(x64: None) -> None:
    layer, params = resampler()

    def gradients(remat: str) -> dict[str, Any]:
        def total(params: Any) -> jax.Array:
            return (layer.clone(remat=remat).apply(params, jnp.asarray(CONTEXT)) ** 2).sum()

        # Norms and activations, which are computed again always, are without prevent_cse.
        steps = jax.make_jaxpr(total)(params).eqns
        assert sum(step.params.get("prevent_cse", False) for step in steps) == RECOMPUTED[remat]
        return flatten_params(jax.jit(jax.grad(total))(params))

    assert_gradients_close(gradients("full"), gradients("none"))
