"""Pictures to tokens: patches, a class token, learned positions, and positions at other sizes (ViT, arXiv:2010.11929).

B batch   gh, gw patch rows and columns   D model width   C channels
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float

from flax_vlm.layers.linear import Initializer, matmul, partitioned, wide


def check_images(images: Float[Array, "B H W C"], num_channels: int, name: str = "pixel_values") -> None:
    """Raises ValueError unless `images`, an argument called `name`, is [B, H, W, num_channels]."""
    if images.ndim != 4 or images.shape[-1] != num_channels:
        advice = ""
        if images.ndim == 4 and images.shape[1] == num_channels:
            advice = f"; these look channels-first as in PyTorch: pass {name}.transpose(0, 2, 3, 1)"
        raise ValueError(
            f"{name} has shape {images.shape}: expected channels-last [batch, height, width, {num_channels}]{advice}"
        )


class PatchConv(nn.Module):
    """A convolution whose kernel and stride are `patch_size`, as one matrix product; a rest at the border is dropped.

    The kernel keeps the convolution's layout [patch, patch, C, D].
    """

    features: int
    patch_size: int
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B gh gw D"]:
        batch, height, width, channels = images.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        init = partitioned(self.kernel_init, (None, None, None, "embed"))
        kernel = self.param("kernel", init, (p, p, channels, self.features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias_init = partitioned(nn.initializers.zeros, ("embed",))
            bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        images, kernel, bias = promote_dtype(images, kernel, bias, dtype=self.dtype)
        patches = images[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, p * p * channels)
        return matmul(patches, kernel.reshape(p * p * channels, self.features), bias)


def exact_scale(patches: int, trained: int) -> float:
    """Patch columns over trained columns: torch's interpolate with `size=`."""
    return patches / trained


def padded_scale(patches: int, trained: int) -> float:
    """The same with 0.1 patch added: DINO's guard against rounding in torch's interpolate with `scale_factor=`."""
    return (patches + 0.1) / trained


def resize_positions(
    table: Float[Array, "n D"], grid: tuple[int, int], scale: Callable[[int, int], float] = exact_scale
) -> Float[Array, "m D"]:
    """A square table of patch positions, resized to `grid` = (rows, columns) by torch's bicubic rule.

    Cubic convolution with A = -0.75, no antialiasing, taps clamped at the border; output i reads around
    `(i + 0.5) / scale - 0.5`. Separable, so two small matrix products; in at least float32.

    Raises:
      ValueError: where the table is not square.
    """
    trained = round(table.shape[0] ** 0.5)
    if trained**2 != table.shape[0]:
        raise ValueError(f"{table.shape[0]} patch positions do not form a square: they cannot be interpolated")
    dtype = wide(table.dtype)
    rows, columns = (jnp.asarray(_bicubic(n, trained, scale(n, trained)), dtype) for n in grid)
    square = table.astype(dtype).reshape(trained, trained, -1)
    resized = jnp.einsum("ay,bx,yxd->abd", rows, columns, square)
    return resized.reshape(grid[0] * grid[1], -1).astype(table.dtype)


def _bicubic(outputs: int, inputs: int, scale: float) -> Float[np.ndarray, "outputs inputs"]:
    """Row i holds the weights of the inputs in output i."""
    weights = np.zeros((outputs, inputs))
    for i in range(outputs):
        centre = (i + 0.5) / scale - 0.5
        first = np.floor(centre)
        for tap in (-1, 0, 1, 2):
            position = int(np.clip(first + tap, 0, inputs - 1))
            weights[i, position] += _cubic(abs(centre - (first + tap)))
    return weights


def _cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    d = distance
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


class PatchEmbed(nn.Module):
    """CLIP's vision embeddings: patches behind a class token, plus a learned position each.

    Parameter names are those of CLIP: `class_embedding`, `patch_embedding`, `position_embedding`.
    """

    hidden_size: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    position_scale: Callable[[int, int], float] = exact_scale
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    class_init: Initializer = nn.initializers.normal(1.0)
    patch_init: Initializer = nn.initializers.normal(0.02)
    position_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(
        self, pixel_values: Float[Array, "B H W C"], interpolate_pos_encoding: bool = False
    ) -> Float[Array, "B P D"]:
        """Raises ValueError for images that are not channels-last, or of another size unless interpolating."""
        check_images(pixel_values, self.num_channels)
        batch, height, width, _ = pixel_values.shape
        size = self.image_size
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({size}*{size}). "
                "You should try to set `interpolate_pos_encoding=True`"
            )
        trained = (size // self.patch_size) ** 2
        class_token = self.param(
            "class_embedding", partitioned(self.class_init, ("embed",)), (self.hidden_size,), self.param_dtype
        )
        conv = PatchConv(
            self.hidden_size,
            self.patch_size,
            kernel_init=self.patch_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="patch_embedding",
        )
        positions = self.param(
            "position_embedding",
            partitioned(self.position_init, (None, "embed")),
            (trained + 1, self.hidden_size),
            self.param_dtype,
        )
        patches = conv(pixel_values)
        rows, columns = patches.shape[1:3]
        # A square picture of the trained number of patches keeps the table as it is, whatever its size in pixels.
        if interpolate_pos_encoding and not (rows * columns == trained and height == width):
            resized = resize_positions(positions[1:], (rows, columns), self.position_scale)
            positions = jnp.concatenate([positions[:1], resized])
        class_token, positions = promote_dtype(class_token, positions, dtype=self.dtype)
        patches = patches.reshape(batch, -1, self.hidden_size)
        first = jnp.broadcast_to(class_token, (batch, 1, self.hidden_size)).astype(patches.dtype)
        return jnp.concatenate([first, patches], axis=1) + positions.astype(patches.dtype)
