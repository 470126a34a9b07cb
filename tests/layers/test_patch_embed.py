"""Patches and positions, against torch's convolution and interpolation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.layers.patch_embed import PatchConv, PatchEmbed, exact_scale, padded_scale, resize_positions
from tests.tolerances import FLOAT64, assert_close

RNG = np.random.default_rng(0)


@pytest.mark.torch
@pytest.mark.parametrize("height, width", [(12, 8), (14, 11), (4, 4), (15, 7)])
def test_patches_are_a_strided_convolution(height: int, width: int, x64: None) -> None:
    import torch

    images, kernel = RNG.standard_normal((2, height, width, 3)), RNG.standard_normal((4, 4, 3, 5))
    conv = PatchConv(5, 4, dtype=jnp.float64, param_dtype=jnp.float64)
    ours = conv.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(images))
    weight = torch.tensor(kernel).permute(3, 2, 0, 1)
    expected = torch.nn.functional.conv2d(torch.tensor(images).permute(0, 3, 1, 2), weight, stride=4)
    assert_close(ours, expected.permute(0, 2, 3, 1), FLOAT64)


@pytest.mark.torch
@pytest.mark.parametrize("grid", [(4, 4), (7, 3), (1, 9), (13, 13), (2, 2), (14, 13)])
@pytest.mark.parametrize("rule", ["size", "scale"])
def test_positions_resize_as_in_torch(rule: str, grid: tuple[int, int], x64: None) -> None:
    import torch

    trained = 4 if grid != (14, 13) else 13
    table = RNG.standard_normal((trained**2, 5))
    square = torch.tensor(table).reshape(1, trained, trained, 5).permute(0, 3, 1, 2)
    if rule == "size":
        how: dict[str, Any] = {"size": grid}
    else:  # as transformers' IdeficsVisionEmbeddings calls it
        how = {"scale_factor": tuple((n + 0.1) / trained for n in grid)}
    expected = torch.nn.functional.interpolate(square, mode="bicubic", align_corners=False, **how)
    assert expected.shape[2:] == grid
    ours = resize_positions(jnp.asarray(table), grid, exact_scale if rule == "size" else padded_scale)
    assert_close(ours.reshape(*grid, 5), expected[0].permute(1, 2, 0), FLOAT64)


def embed(size: int = 8, **inputs: Any) -> Any:
    layer = PatchEmbed(6, size, 2, class_init=nn.initializers.normal(1.0))
    images = jnp.ones((1, size, size, 3))
    params = nn.meta.unbox(layer.init(jax.random.key(0), images))
    return layer.apply(params, **{"pixel_values": images} | inputs), params["params"]


def test_a_square_picture_of_the_trained_count_keeps_the_table() -> None:
    plain, _ = embed()
    assert_close(embed(interpolate_pos_encoding=True)[0], plain, 0.0)
    larger, _ = embed(pixel_values=jnp.ones((1, 9, 9, 3)), interpolate_pos_encoding=True)  # 4 x 4 patches, too
    assert_close(larger, plain, 0.0)


def test_the_class_token_comes_first_and_keeps_its_position() -> None:
    tokens, params = embed(pixel_values=jnp.zeros((1, 6, 10, 3)), interpolate_pos_encoding=True)
    assert tokens.shape == (1, 1 + 3 * 5, 6)
    assert_close(tokens[0, 0], params["class_embedding"] + params["position_embedding"][0], 1e-7)


def test_wrong_pictures_are_refused(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match=r"channels-last.*channels-first as in PyTorch"):
        embed(pixel_values=jnp.ones((1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\): expected channels-last \[batch, height, width, 3\]"):
        embed(pixel_values=jnp.ones((8, 8, 3)))
    with pytest.raises(ValueError, match=r"\(8\*6\) doesn't match model \(8\*8\)"):
        embed(pixel_values=jnp.ones((1, 8, 6, 3)))
    with pytest.raises(ValueError, match="5 patch positions do not form a square"):
        resize_positions(jnp.zeros((5, 2)), (2, 2))
