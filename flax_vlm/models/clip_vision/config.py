"""Configuration of the CLIP image tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax_vlm.layers.feed_forward import activation
from flax_vlm.models.config import config_from_hf, config_to_hf, require_divisible, require_positive


def _square(size: Any) -> Any:
    """transformers 5.x allows [height, width]; the model has always been square."""
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise ValueError(f"config.json: size {size}: expected equal height and width")
        return size[0]
    return size


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the tower; names and defaults are those of transformers' AltCLIPVisionConfig."""

    model_type: ClassVar[str] = "clip_vision_model"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
        require_positive(self, *sizes, "image_size", "patch_size")
        require_divisible(self, "hidden_size", "num_attention_heads")
        activation(self.hidden_act)
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "CLIPVisionConfig":
        """From the dictionary of a config.json; ValueError for a value that cannot be."""
        return config_from_hf(
            cls, data, {"image_size": _square, "patch_size": _square}, frozenset({"dropout", "hidden_dropout"})
        )

    def to_hf(self) -> dict[str, Any]:
        """As a dictionary for config.json."""
        return config_to_hf(self)
