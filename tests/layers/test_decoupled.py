"""A vocabulary in two parts: lookup, head and tied head, and that each part learns for itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_vlm.layers.decoupled import DecoupledEmbed, DecoupledHead
from tests.tolerances import FLOAT64, assert_close

V, A, D = 7, 3, 4
RNG = np.random.default_rng(0)
IDS = jnp.asarray([[0, 6, 7], [9, 2, 8]])
DTYPES: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def embed(additional: int = A) -> tuple[DecoupledEmbed, Any]:
    layer = DecoupledEmbed(V, D, num_additional_embeddings=additional, **DTYPES)
    return layer, nn.meta.unbox(layer.init(jax.random.key(0), IDS))


def tables(params: Any) -> np.ndarray:
    """Both, one below the other."""
    additional = params["params"]["additional_embedding"]["embedding"]
    return np.concatenate([params["params"]["embedding"], additional])


def test_ids_past_the_main_vocabulary_are_additional(x64: None) -> None:
    layer, params = embed()
    assert_close(layer.apply(params, IDS), tables(params)[IDS], 0.0)
    assert jnp.isnan(layer.apply(params, jnp.asarray([V + A]))).all()


def test_each_table_learns_from_its_own_tokens(x64: None) -> None:
    layer, params = embed()
    gradient = jax.grad(lambda p: layer.apply(p, IDS).sum())(params)["params"]
    assert gradient["embedding"].any(-1).tolist() == [True, False, True, False, False, False, True]
    assert gradient["additional_embedding"]["embedding"].any(-1).tolist() == [True, True, True]
    # Row 0 stands in for additional tokens in the main lookup, and must not learn from them.
    gradient = jax.grad(lambda p: layer.apply(p, IDS[1:]).sum())(params)["params"]
    assert not gradient["embedding"][0].any()


def test_tied_head(x64: None) -> None:
    layer, params = embed()
    states = RNG.standard_normal((2, 5, D))
    logits = layer.apply(params, jnp.asarray(states), method="attend")
    assert_close(logits, states @ tables(params).T, FLOAT64)


def test_head(x64: None) -> None:
    layer = DecoupledHead(V, num_additional_features=A, **DTYPES)
    states = RNG.standard_normal((2, 5, D))
    params = nn.meta.unbox(layer.init(jax.random.key(0), jnp.asarray(states)))
    kernels = [params["params"]["kernel"], params["params"]["additional_fc"]["kernel"]]
    assert_close(layer.apply(params, jnp.asarray(states)), states @ np.concatenate(kernels, axis=1), FLOAT64)


def test_without_additional_tokens_there_is_one_table(x64: None) -> None:
    layer, params = embed(additional=0)
    assert params["params"].keys() == {"embedding"}
    table, ids, states = params["params"]["embedding"], IDS[:1, :2], RNG.standard_normal((2, D))
    assert_close(layer.apply(params, ids), table[ids], 0.0)
    assert_close(layer.apply(params, jnp.asarray(states), method="attend"), states @ np.asarray(table).T, FLOAT64)
    assert jnp.isnan(layer.apply(params, jnp.asarray([V]))).all()
    head = DecoupledHead(V, **DTYPES)
    assert jax.eval_shape(head.init, jax.random.key(0), jnp.ones((2, D)))["params"].keys() == {"kernel"}
