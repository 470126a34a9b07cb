"""The TPU kernel, interpreted on the CPU, against the plain path: what it gives, and gradients."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.layers import splash
from flax_vlm.layers.attention import Mask, attend, causal_mask, padding_mask, segment_mask
from tests.tolerances import FLOAT32, assert_close

ROOT = Path(__file__).parents[2]
B, T, N, K, H = 2, 150, 4, 2, 24
IMAGES, PATCHES = 3, 45  # their product is the number of keys that images bring
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 128 for 150 tokens, as for thousands of them on a TPU."""
    monkeypatch.setattr(splash, "_BLOCKS", (128,))


def images(most: int) -> jax.Array:
    """Each token looks at so many images at most, some at none."""
    order = RNG.permuted(np.tile(np.arange(IMAGES), (B, T, 1)), axis=-1)
    return jnp.asarray((order < RNG.integers(0, most + 1, (B, T, 1)))[:, None])


TOKENS = np.arange(T) >= np.array([[0], [17]])  # the second row has padding on the left
DOCUMENTS = np.where(TOKENS, 1 + (np.arange(T) > 60), 0)  # ... and all rows two documents
MASKS: dict[str, tuple[int, Any]] = {
    "none": (T, None),
    "keys that need padding": (IMAGES * PATCHES, None),
    "causal": (T, causal_mask(T, T)),
    "padding": (T, padding_mask(jnp.asarray(TOKENS))),
    "causal, padding": (T, causal_mask(T, T) & padding_mask(jnp.asarray(TOKENS))),
    "packed": (T, causal_mask(T, T) & segment_mask(jnp.asarray(DOCUMENTS)) & padding_mask(jnp.asarray(TOKENS))),
    "an image each": (IMAGES * PATCHES, images(1)),
    "several images": (IMAGES * PATCHES, images(2)),
    "one image for all": (IMAGES * PATCHES, jnp.asarray(np.eye(IMAGES, dtype=bool)[[0, 2]])[:, None, None]),
}


def arrays(num_keys: int, dtype: Any = np.float32) -> list[jax.Array]:
    shapes = ((B, T, N, H), (B, num_keys, K, H), (B, num_keys, K, H))
    return [jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(implementation: Any, num_keys: int, mask: Any, dtype: Any = np.float32) -> tuple[Any, Any]:
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, N, H)), dtype)

    def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, _ = attend(*qkv, mask=mask, scale=0.3, implementation=implementation)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays(num_keys, dtype))
    return out, gradients


@pytest.mark.parametrize("name", MASKS)
def test_equals_the_plain_path_with_gradients(name: str) -> None:
    """In float32, against float64."""
    out, gradients = value_and_gradients("splash", *MASKS[name])
    with jax.enable_x64(True):
        exact_out, exact_gradients = value_and_gradients("xla", *MASKS[name], np.float64)
    assert_close(out, exact_out, FLOAT32, "out")
    for what, one, exact in zip(("query", "key", "value"), gradients, exact_gradients, strict=True):
        assert_close(one, exact, FLOAT32, f"gradient of {what}")


def test_a_token_that_sees_nothing_takes_zero() -> None:
    num_keys, seen = MASKS["an image each"]
    out, _ = value_and_gradients("splash", num_keys, seen)
    blind = ~np.asarray(seen)[:, 0].any(-1)
    assert blind.any() and not np.asarray(out)[blind].any()


def test_bfloat16_is_summed_in_float32() -> None:
    def causal(implementation: Any, dtype: Any) -> jax.Array:
        program = jax.jit(lambda *qkv: attend(*qkv, mask=causal_mask(T, T), implementation=implementation)[0])
        return program(*arrays(T, dtype))

    exact = np.asarray(causal("xla", np.float32))

    def rms(implementation: Any) -> float:
        out = causal(implementation, jnp.bfloat16)
        assert out.dtype == jnp.bfloat16
        return float(np.sqrt(np.square(np.asarray(out, np.float32) - exact).mean()))

    assert rms("splash") < 1.05 * rms("xla")


def test_blocks_follow_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "_BLOCKS", (512, 384, 256))
    blocks = {length: splash._block(length) for length in (64, 257, 577, 1024, 1600, 6401)}
    assert blocks == {64: 128, 257: 384, 577: 384, 1024: 512, 1600: 256, 6401: 384}


def test_a_tpu_takes_it_and_others_do_not() -> None:
    def program(num_keys: int, mask: Any, platform: str) -> str:
        traced = jax.jit(lambda *qkv: attend(*qkv, mask=mask)[0]).trace(*arrays(num_keys))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    for num_keys, mask in MASKS.values():
        assert "splash_mha_fwd" in program(num_keys, mask, "tpu")
        assert "splash_mha_fwd" not in program(num_keys, mask, "cpu")
        assert "splash_mha_fwd" not in program(num_keys, mask, "cuda")
    assert "splash_mha_fwd" not in program(T, padding_mask(jnp.ones((B, T, T))), "tpu")


def test_what_it_cannot_serve_is_said(unchecked_types: None) -> None:
    query, key, value = arrays(T)

    def refuses(match: str, **options: Any) -> None:
        qkv = options.pop("arrays", (query, key, value))
        with pytest.raises(ValueError, match=f"'splash' cannot serve {match}"):
            attend(*qkv, implementation="splash", **options)

    refuses("a bias", bias=jnp.zeros((1, 1, T, T)))
    refuses("float16", arrays=[array.astype(jnp.float16) for array in (query, key, value)])
    refuses("a causal mask of 150 queries and 100 keys", arrays=(query, key[:, :100], value[:, :100]), causal=True)
    refuses("a mask that differs between heads", mask=jnp.ones((B, N, 1, T), bool))
    refuses("a mask, already written out, that differs between queries", mask=Mask(jnp.ones((B, 1, T, T), bool)))
    with pytest.raises(ValueError, match="'xla' only"):
        attend(query, key, value, implementation="splash", return_weights=True)


@pytest.mark.slow
def test_a_mesh_changes_nothing() -> None:
    script = ROOT / "tests" / "layers" / "attention_on_eight_devices.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "attention agrees" in done.stdout
