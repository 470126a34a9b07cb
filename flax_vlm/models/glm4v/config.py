"""GLM-4V's configuration, with the names of THUDM's `ChatGLMConfig`; also read from a config of transformers' `glm`."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from reprlib import repr as shortened
from typing import Any, ClassVar

from flax_vlm.layers.feed_forward import activation
from flax_vlm.models.clip_vision.config import MAX_PATCHES
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

# What ChatGLM's code can do otherwise, and no released GLM-4V does. Files that leave a key out mean these.
_FIXED = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}
# Without effect on any number (`apply_query_key_layer_scaling` divides the scores and multiplies them again).
_IGNORED = frozenset(
    """
    apply_query_key_layer_scaling attention_softmax_in_fp32 auto_map bias_dropout_fusion classifier_dropout
    pre_seq_len prefix_projection vocab_size
    """.split()
)

# Of transformers' `glm`, the decoder alone: what a key is called here.
_GLM_NAMES = {
    "vocab_size": "padded_vocab_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "seq_length",
}
_GLM_FIXED = {"hidden_act": "silu", "attention_bias": True, "partial_rotary_factor": 0.5, "rope_type": "default"}


@dataclasses.dataclass(frozen=True)
class GLM4VVisionConfig:
    """The image tower, EVA2-CLIP. Defaults are those of glm-4v-9b."""

    model_type: ClassVar[str] = "chatglm"  # a section of that file, which has no type of its own

    hidden_size: Size = 1792
    intermediate_size: Size = 15360
    num_hidden_layers: Depth = 63
    num_heads: Size = 16
    in_channels: Size = 3
    image_size: Size = 1120
    patch_size: Size = 14
    num_positions: Size = 6401
    hidden_act: str = "gelu"
    layer_norm_eps: Fraction = 1e-6
    dropout_prob: Fraction = 0.0
    scaling_factor: float = 8.0

    def __post_init__(self) -> None:
        check_fields(self)
        require_divisible(self, "hidden_size", "num_heads")
        activation(self.hidden_act)
        sizes = f"image_size {self.image_size} and patch_size {self.patch_size}"
        if self.image_size % (2 * self.patch_size):
            raise ValueError(f"{sizes}: expected an even number of patches a side, they are merged two by two")
        if self.grid**2 > MAX_PATCHES:
            raise ValueError(f"{sizes} make more than {MAX_PATCHES} patches: expected fewer, or larger ones")
        if self.num_positions != self.grid**2 + 1:
            raise ValueError(f"num_positions is {self.num_positions}: expected {self.grid**2 + 1}, because of {sizes}")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}: expected a number above 0")

    @property
    def grid(self) -> int:
        """Patches on a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Merged patches of a picture, as the decoder gets them."""
        return (self.grid // 2) ** 2

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "GLM4VVisionConfig":
        """From a section of a config.json; ValueError for a value that cannot be."""
        return config_from_hf(cls, data)

    def to_hf(self) -> dict[str, Any]:
        """As a section of config.json."""
        data = config_to_hf(self)
        del data["model_type"]
        return data


@dataclasses.dataclass(frozen=True)
class GLM4VConfig:
    """The whole model; without `vision_config` the ChatGLM4 decoder alone. Defaults are those of glm-4v-9b."""

    model_type: ClassVar[str] = "chatglm"

    hidden_size: Size = 4096
    num_layers: Depth = 40
    num_attention_heads: Size = 32
    kv_channels: Size = 128
    multi_query_group_num: Size = 2
    ffn_hidden_size: Size = 13696
    layernorm_epsilon: Fraction = 1.5625e-7
    rope_ratio: float = 1.0
    seq_length: Size = 8192
    padded_vocab_size: Size = 151552
    hidden_dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    initializer_range: float = 0.02
    eos_token_id: tuple[int, ...] = (151329, 151336, 151338)
    pad_token_id: int | None = 151329
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    vision_config: GLM4VVisionConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        require_divisible(self, "num_attention_heads", "multi_query_group_num")
        if self.kv_channels % 4:
            raise ValueError(f"kv_channels is {self.kv_channels}: expected a multiple of 4, half of it turns in pairs")
        if self.rope_ratio <= 0:
            raise ValueError(f"rope_ratio is {self.rope_ratio}: expected a number above 0")
        if self.vision_config is not None:
            ids = {"boi_token_id": self.boi_token_id, "eoi_token_id": self.eoi_token_id}
            for name, value in ids.items():
                if value is None or not 0 <= value < self.padded_vocab_size:
                    raise ValueError(f"{name} is {value}: pictures need one below {self.padded_vocab_size}")
            if self.boi_token_id == self.eoi_token_id:
                raise ValueError(f"boi_token_id and eoi_token_id are both {self.boi_token_id}: expected two ids")

    @property
    def vocab_size(self) -> int:
        return self.padded_vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.seq_length

    @property
    def more_slots(self) -> int:
        """How many slots a picture takes besides those of its three ids."""
        return 0 if self.vision_config is None else self.vision_config.num_patches - 1

    @property
    def picture_ids(self) -> tuple[int, int]:
        """Begin and end of a picture; ValueError where the model has none."""
        if self.boi_token_id is None or self.eoi_token_id is None:
            raise ValueError("boi_token_id and eoi_token_id are not set: this model reads no pictures")
        return self.boi_token_id, self.eoi_token_id

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies."""
        return 10000.0 * self.rope_ratio

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "GLM4VConfig":
        """From the dictionary of a config.json; ValueError for a value that cannot be."""
        if data.get("model_type") == "glm":
            data = _from_glm(data)
        _require(data, _FIXED)
        if data.get("pre_seq_len") is not None:
            raise ValueError(
                f"config.json: pre_seq_len is {shortened(data['pre_seq_len'])}: expected null, the PrefixEncoder of "
                "p-tuning is not supported"
            )
        if data.get("tie_word_embeddings", False) is not False:
            raise ValueError("config.json: tie_word_embeddings is set: expected false, GLM-4V has a head of its own")
        vision = section(data, "vision_config")
        fields = {**data, "vision_config": GLM4VVisionConfig.from_hf(vision) if vision else None}
        return config_from_hf(cls, fields, {"eos_token_id": partial(_ids, "eos_token_id")}, _FIXED.keys() | _IGNORED)

    def to_hf(self) -> dict[str, Any]:
        """As a dictionary for config.json."""
        data = {**config_to_hf(self), **_FIXED, "tie_word_embeddings": False}
        data["eos_token_id"] = list(self.eos_token_id)
        if self.vision_config is not None:
            data["vision_config"] = self.vision_config.to_hf()
        return data


def _from_glm(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of transformers' `glm` with our names. Rotary parameters have a section from 5.x on."""
    if data.get("rope_scaling") not in (None, {}):
        raise ValueError(f"config.json: rope_scaling is {shortened(data['rope_scaling'])}: expected null")
    data = {"max_position_embeddings": 131072, **data, **section(data, "rope_parameters")}
    _require(data, _GLM_FIXED)
    theta = data.get("rope_theta", 10000.0)
    if not isinstance(theta, int | float):
        raise ValueError(f"config.json: rope_theta is {shortened(theta)}: expected a number")
    known = {"rope_theta", "rope_parameters", "rope_scaling", "bos_token_id", *_GLM_FIXED}
    renamed = {_GLM_NAMES.get(name, name): value for name, value in data.items() if name not in known}
    return renamed | {"rope_ratio": theta / 10000}


def _require(data: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises ValueError where a key of `fixed` is there with another value."""
    for name, expected in fixed.items():
        if data.get(name, expected) != expected:
            raise ValueError(
                f"config.json: {name} is {shortened(data[name])}: expected {expected!r}, the only one supported"
            )


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """One id, several or none."""
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(type(each) is int for each in ids):
        raise ValueError(f"{name} is {shortened(value)}: expected a token id, or a list of them")
    return tuple(ids)
