"""Configuration of the CLIP image tower."""

import dataclasses
from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any, ClassVar, NamedTuple

from flax_vlm.layers.feed_forward import activation
from flax_vlm.models.config import Depth, Fraction, Size, check_fields, config_from_hf, config_to_hf, require_divisible

MAX_PATCHES = 2**16  # far more than any model was trained with, and less than makes one slow to build


class Spread(NamedTuple):
    """With what standard deviation the weights of a tower start. Biases are zero, norms one."""

    class_token: float
    embeddings: float  # of patches and positions
    attention_in: float
    attention_out: float
    fc1: float
    fc2: float


def _square(size: Any) -> Any:
    """transformers 5.x allows [height, width]; the model has always been square."""
    if isinstance(size, list | tuple):
        if not size or list(size) != [size[0]] * len(size):
            raise ValueError(f"size {shortened(size)}: expected equal height and width")
        return size[0]
    return size


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the tower; names and defaults are those of transformers' AltCLIPVisionConfig."""

    model_type: ClassVar[str] = "clip_vision_model"

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    projection_dim: Size = 512
    num_hidden_layers: Depth = 12
    num_attention_heads: Size = 12
    num_channels: Size = 3
    image_size: Size = 224
    patch_size: Size = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Fraction = 1e-5
    attention_dropout: Fraction = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        require_divisible(self, "hidden_size", "num_attention_heads")
        activation(self.hidden_act)
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if (self.image_size // self.patch_size) ** 2 > MAX_PATCHES:
            sizes = f"image_size {self.image_size} and patch_size {self.patch_size}"
            raise ValueError(f"{sizes} make more than {MAX_PATCHES} patches: expected fewer, or larger ones")

    @property
    def spread(self) -> Spread:
        """OpenAI's CLIP: by width, and narrower into the residual stream the deeper the tower."""
        factor, width, layers = self.initializer_factor, self.hidden_size, self.num_hidden_layers
        return Spread(
            class_token=factor * width**-0.5,
            embeddings=factor * self.initializer_range,
            attention_in=factor * (2 * width * layers) ** -0.5,
            attention_out=factor * width**-0.5,
            fc1=factor * (2 * width) ** -0.5,
            fc2=factor * (2 * width * layers) ** -0.5,
        )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "CLIPVisionConfig":
        """From the dictionary of a config.json; ValueError for a value that cannot be."""
        return config_from_hf(
            cls, data, {"image_size": _square, "patch_size": _square}, frozenset({"dropout", "hidden_dropout"})
        )

    def to_hf(self) -> dict[str, Any]:
        """As a dictionary for config.json."""
        return config_to_hf(self)
