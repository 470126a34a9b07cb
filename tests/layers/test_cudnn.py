"""cuDNN's attention: everything around the kernel on any machine, the kernel itself where there is a GPU."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from flax_vlm.layers import cudnn
from flax_vlm.layers.attention import Mask, attend, causal_mask, padding_mask, segment_mask
from tests.tolerances import FLOAT32, assert_close

B, T, N, K, H = 2, 151, 4, 2, 24
IMAGES, PATCHES = 3, 45
RNG = np.random.default_rng(0)
TOKENS = np.arange(T) >= np.array([[0], [17]])
SEES = RNG.random((B, 1, T, IMAGES)) < 0.4  # some see no image at all
MASKS: dict[str, tuple[int, Mask | None]] = {
    "none": (T, None),
    "causal": (T, causal_mask(T, T)),
    "padding": (130, padding_mask(jnp.asarray(TOKENS[:, :130]))),
    "causal, padding": (T, causal_mask(T, T) & padding_mask(jnp.asarray(TOKENS))),
    "packed": (T, causal_mask(T, T) & segment_mask(jnp.asarray(np.where(TOKENS, 1 + (np.arange(T) > 60), 0)))),
    "images": (IMAGES * PATCHES, Mask(jnp.asarray(SEES))),
}
WIDTHS = (64, 80, 96, 112, 128)  # of AltCLIP, IDEFICS' towers and decoder, GLM-4V's tower and decoder


def arrays(num_keys: int, dtype: Any, head_dim: int = H) -> list[jax.Array]:
    shapes = ((B, T, N, head_dim), (B, num_keys, K, head_dim), (B, num_keys, K, head_dim))
    return [jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(implementation: Any, qkv: list[jax.Array], mask: Mask | None) -> tuple[Any, ...]:
    weights = jnp.asarray(np.random.default_rng(2).standard_normal(qkv[0].shape), jnp.float32)

    def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, _ = attend(*qkv, mask=mask, scale=0.3, implementation=implementation)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*qkv)
    return out, *gradients


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for a GPU is told that there is one: programs can be made for it, not run."""
    monkeypatch.setattr(cudnn, "is_there", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.fixture
def kernel_by_xla(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the kernel, what jax documents as its equal; as the kernel, it takes no odd lengths."""
    whole = jax.nn.dot_product_attention

    def run(query: jax.Array, key: jax.Array, *rest: Any, implementation: str, mask: Any = None, **options: Any) -> Any:
        assert implementation == "cudnn"
        assert query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
        assert mask is None or mask.shape[2:] == (query.shape[1], key.shape[1])
        return whole(query, key, *rest, mask=mask, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", run)
    monkeypatch.setattr(jnp, "bfloat16", jnp.float32)  # what `fault` lets pass


@pytest.mark.parametrize("name", MASKS)
def test_masks_scale_and_grouped_keys(kernel_by_xla: None, name: str) -> None:
    num_keys, mask = MASKS[name]
    found = value_and_gradients("cudnn", arrays(num_keys, np.float32), mask)
    with jax.enable_x64(True):
        exact = value_and_gradients("xla", arrays(num_keys, np.float64), mask)
    for what, one, right in zip(("out", "query", "key", "value"), found, exact, strict=True):
        assert_close(one, right, FLOAT32, what)


def test_a_query_that_sees_nothing_takes_zero(kernel_by_xla: None) -> None:
    num_keys, mask = MASKS["images"]
    out, *_ = value_and_gradients("cudnn", arrays(num_keys, np.float32), mask)
    blind = ~SEES[:, 0].any(-1)
    assert blind.any() and not np.asarray(out)[blind].any()


def test_a_gpu_takes_it_and_others_do_not(a_gpu: None) -> None:
    def program(num_keys: int, mask: Any, dtype: Any, platform: str, head_dim: int = H) -> str:
        def total(*qkv: jax.Array) -> jax.Array:
            return attend(*qkv, mask=mask)[0].astype(jnp.float32).sum()

        traced = jax.jit(jax.value_and_grad(total)).trace(*arrays(num_keys, dtype, head_dim))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    for num_keys, mask in MASKS.values():
        text = program(num_keys, mask, jnp.bfloat16, "cuda")
        assert "__cudnn$fmha" in text and "Backward" in text
        assert "__cudnn$fmha" not in program(num_keys, mask, jnp.bfloat16, "cpu")
    for head_dim in WIDTHS:
        assert "__cudnn$fmha" in program(T, causal_mask(T, T), jnp.bfloat16, "cuda", head_dim)
    assert "__cudnn$fmha" not in program(T, causal_mask(T, T), jnp.float32, "cuda")


def test_what_it_cannot_serve_is_said(a_gpu: None, unchecked_types: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(match: str, qkv: list[jax.Array], **options: Any) -> None:
        with pytest.raises(ValueError, match=f"'cudnn' cannot serve {match}"):
            attend(*qkv, implementation="cudnn", **options)

    half = arrays(T, jnp.bfloat16)
    refuses("float32", arrays(T, np.float32))
    refuses("a head width of 20", arrays(T, jnp.bfloat16, 20))
    refuses("a head width of 136", arrays(T, jnp.bfloat16, 136))
    refuses("a bias", half, bias=jnp.zeros((1, 1, T, T)))
    refuses("a causal mask of 151 queries and 100 keys", [half[0], *arrays(100, jnp.bfloat16)[1:]], causal=True)
    monkeypatch.undo()
    if not cudnn.is_there():
        refuses(f"a program for {jax.default_backend()}", half)


@pytest.mark.skipif(not cudnn.is_there(), reason="no NVIDIA GPU")
def test_on_a_gpu() -> None:
    """In bfloat16, against float32: no further off than the plain path, by the RMS of the errors."""
    for (name, (num_keys, mask)), head_dim in itertools.product(MASKS.items(), WIDTHS):
        half = arrays(num_keys, jnp.bfloat16, head_dim)
        exact = value_and_gradients("xla", [array.astype(jnp.float32) for array in half], mask)
        found, plain = (value_and_gradients(implementation, half, mask) for implementation in ("cudnn", "xla"))
        for what, one, other, right in zip(("out", "query", "key", "value"), found, plain, exact, strict=True):
            one, other, right = (np.asarray(array, np.float64) for array in (one, other, right))
            assert np.square(one - right).mean() < 1.1 * np.square(other - right).mean(), (name, head_dim, what)
