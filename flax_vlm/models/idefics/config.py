"""IDEFICS' configuration (Laurençon et al., arXiv:2306.16527), as transformers names it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from reprlib import repr as shortened
from typing import Any, ClassVar, TypeAlias, get_args

from flax_vlm.layers.feed_forward import activation
from flax_vlm.layers.gated_cross_attention import AlphaInitializer, AlphaType
from flax_vlm.models.clip_vision.config import CLIPVisionConfig, Spread
from flax_vlm.models.config import (
    Depth,
    Fraction,
    Size,
    check_fields,
    config_from_hf,
    config_to_hf,
    require_divisible,
    section,
)

MODULE_EXCEPTIONS = ("LayerNorm", "Linear", "Embedding")

ModuleExceptions: TypeAlias = tuple[str, ...]

# Keys of the configs that the repositories were released with in 2023: flat, where there are sections now.
_FLAT_VISION = {
    "vision_embed_dim": "embed_dim",
    "vision_image_size": "image_size",
    "vision_patch_size": "patch_size",
    "vision_intermediate_size": "intermediate_size",
    "vision_num_hidden_layers": "num_hidden_layers",
    "vision_num_attention_heads": "num_attention_heads",
    "vision_hidden_act": "hidden_act",
}
_PERCEIVER = (
    "use_resampler",
    "resampler_n_latents",
    "resampler_depth",
    "resampler_n_heads",
    "resampler_head_dim",
    "qk_layer_norms_perceiver",
)
_IGNORED = frozenset(
    {"cross_layer_activation_function", "max_sequence_length", "max_new_tokens", "ffn_dim", "vision_model_name"}
)


@dataclasses.dataclass(frozen=True)
class IdeficsVisionConfig(CLIPVisionConfig):
    """The image tower. Defaults are transformers'; the width, `hidden_size` here, is `embed_dim` in files."""

    model_type: ClassVar[str] = "idefics_vision"

    intermediate_size: Size = 5120
    num_hidden_layers: Depth = 32
    num_attention_heads: Size = 16
    patch_size: Size = 14
    hidden_act: str = "gelu"

    @property
    def embed_dim(self) -> int:
        return self.hidden_size

    @property
    def spread(self) -> Spread:
        """One for all weights but the class token."""
        return Spread(1.0, *[self.initializer_range] * 5)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "IdeficsVisionConfig":
        """From a section of a config.json; ValueError for a value that cannot be."""
        renamed = {("hidden_size" if key == "embed_dim" else key): value for key, value in data.items()}
        renamed = {key: value for key, value in renamed.items() if key not in ("vision_model_name", "projection_dim")}
        return super().from_hf(renamed)  # pyright: ignore[reportReturnType] - it makes an object of cls

    def to_hf(self) -> dict[str, Any]:
        data = config_to_hf(self)
        del data["projection_dim"]
        return {("embed_dim" if key == "hidden_size" else key): value for key, value in data.items()}


@dataclasses.dataclass(frozen=True)
class IdeficsPerceiverConfig:
    """The resampler."""

    model_type: ClassVar[str] = "idefics_perciever"  # so spelt in files

    resampler_n_latents: Size = 64
    resampler_depth: Depth = 6
    resampler_n_heads: Size = 16
    resampler_head_dim: Size = 96
    qk_layer_norms_perceiver: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "IdeficsPerceiverConfig":
        """From a section of a config.json; ValueError for a value that cannot be."""
        return config_from_hf(cls, data, ignore=frozenset({"use_resampler"}))

    def to_hf(self) -> dict[str, Any]:
        return config_to_hf(self)


def _exceptions(name: str, value: Any) -> ModuleExceptions:
    if not isinstance(value, list | tuple) or not set(map(str, value)) <= set(MODULE_EXCEPTIONS):
        raise ValueError(f"{name} is {shortened(value)}: expected a list, of {', '.join(MODULE_EXCEPTIONS)}")
    return tuple(value)


@dataclasses.dataclass(frozen=True)
class IdeficsConfig:
    """The whole model. Defaults are transformers'; `rope_theta` stands in `rope_parameters` in files."""

    model_type: ClassVar[str] = "idefics"

    vocab_size: Size = 32000
    additional_vocab_size: int = 0
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Depth = 32
    num_attention_heads: Size = 32
    dropout: Fraction = 0.0
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    alpha_initializer: str = "zeros"
    alphas_initializer_range: float = 0.0
    alpha_type: str = "float"
    rms_norm_eps: Fraction = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False
    cross_layer_interval: Size = 1
    qk_layer_norms: bool = False
    freeze_text_layers: bool = True
    freeze_text_module_exceptions: ModuleExceptions = ()
    freeze_lm_head: bool = False
    freeze_vision_layers: bool = True
    freeze_vision_module_exceptions: ModuleExceptions = ()
    use_resampler: bool = False
    max_position_embeddings: Size = 2048
    rope_theta: float = 10000.0
    vision_config: IdeficsVisionConfig = IdeficsVisionConfig()
    perceiver_config: IdeficsPerceiverConfig = IdeficsPerceiverConfig()

    def __post_init__(self) -> None:
        check_fields(self)
        require_divisible(self, "hidden_size", "num_attention_heads")
        require_divisible(self, "num_hidden_layers", "cross_layer_interval")
        activation(self.hidden_act)
        if self.head_dim % 2:
            raise ValueError(f"heads of {self.head_dim}: rotary positions need an even width")
        if self.additional_vocab_size < 0:
            raise ValueError(f"additional_vocab_size is {self.additional_vocab_size}: expected 0 or more")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta is {self.rope_theta}: expected a number above 0")
        for name, allowed in (("alpha_type", AlphaType), ("alpha_initializer", AlphaInitializer)):
            if getattr(self, name) not in get_args(allowed):
                value = shortened(getattr(self, name))
                raise ValueError(f"{name} is {value}: expected one of {', '.join(get_args(allowed))}")

    @property
    def image_tokens(self) -> int:
        """What text looks at of a picture of the model's own size."""
        vision = self.vision_config
        if self.use_resampler:
            return self.perceiver_config.resampler_n_latents
        return (vision.image_size // vision.patch_size) ** 2 + 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "IdeficsConfig":
        """From the dictionary of a config.json, flat ones of 2023 included; ValueError for a value that cannot be."""
        flat_vision = {name: data[key] for key, name in _FLAT_VISION.items() if key in data}
        flat_perceiver = {key: data[key] for key in _PERCEIVER if key in data}
        perceiver = {**flat_perceiver, **section(data, "perceiver_config")}
        fields = {
            **data,
            "vision_config": IdeficsVisionConfig.from_hf({**flat_vision, **section(data, "vision_config")}),
            "perceiver_config": IdeficsPerceiverConfig.from_hf(perceiver),
            "rope_theta": _rope_theta(data),
        }
        ignored = _IGNORED | _FLAT_VISION.keys() | {*_PERCEIVER, "rope_parameters", "rope_scaling"}
        exceptions = ("freeze_text_module_exceptions", "freeze_vision_module_exceptions")
        return config_from_hf(cls, fields, {name: partial(_exceptions, name) for name in exceptions}, ignored)

    def to_hf(self) -> dict[str, Any]:
        """As a dictionary for config.json."""
        data = config_to_hf(self)
        theta = data.pop("rope_theta")
        if theta != type(self).rope_theta:
            data["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        for name in ("freeze_text_module_exceptions", "freeze_vision_module_exceptions"):
            data[name] = list(data[name])
        sections = {"vision_config": self.vision_config.to_hf(), "perceiver_config": self.perceiver_config.to_hf()}
        return data | sections


def _rope_theta(data: Mapping[str, Any]) -> Any:
    """transformers 5.x writes a section; 4.x has the default, or a key of its own in derived configs."""
    if data.get("rope_scaling") not in (None, {}):
        raise ValueError(f"config.json: rope_scaling is {shortened(data['rope_scaling'])}: expected null")
    parameters = section(data, "rope_parameters")
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: rope_type is {shortened(parameters['rope_type'])}: expected 'default'")
    return parameters.get("rope_theta", data.get("rope_theta", IdeficsConfig.rope_theta))
