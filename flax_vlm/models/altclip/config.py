"""AltCLIP's configuration (Chen et al., arXiv:2211.06679), as transformers names it."""

import dataclasses
from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any, ClassVar, TypeAlias

from flax_vlm.layers.feed_forward import activation
from flax_vlm.models.clip_vision.config import CLIPVisionConfig
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

POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")

PrunedHeads: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]


def _pruned_heads(value: Any) -> PrunedHeads:
    """{"0": [1], "2": [0, 2]} as it stands in config.json -> ((0, (1,)), (2, (0, 2)))."""

    def plain(layer: Any, heads: Any) -> bool:
        numbers = isinstance(heads, list) and all(type(head) is int for head in heads)
        return str(layer).isdecimal() and numbers and len(set(heads)) == len(heads)

    table = {} if value is None else value
    if not isinstance(table, Mapping) or not all(plain(*each) for each in table.items()):
        raise ValueError(f"pruned_heads is {shortened(value)}: expected an object of lists, layer to heads, each once")
    return tuple(sorted((int(layer), tuple(sorted(heads))) for layer, heads in table.items() if heads))


@dataclasses.dataclass(frozen=True)
class AltCLIPTextConfig:
    """The XLM-R text tower. Defaults are BAAI/AltCLIP's.

    `pruned_heads` holds (layer, heads) pairs in the numbering of the whole model.
    """

    model_type: ClassVar[str] = "altclip_text_model"

    vocab_size: Size = 250002
    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Depth = 24
    num_attention_heads: Size = 16
    max_position_embeddings: Size = 514
    type_vocab_size: Size = 1
    hidden_act: str = "gelu"
    layer_norm_eps: Fraction = 1e-5
    hidden_dropout_prob: Fraction = 0.1
    attention_probs_dropout_prob: Fraction = 0.1
    initializer_range: float = 0.02
    initializer_factor: float = 0.02
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    project_dim: Size = 768
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    pruned_heads: PrunedHeads = ()

    def __post_init__(self) -> None:
        check_fields(self)
        require_divisible(self, "hidden_size", "num_attention_heads")
        activation(self.hidden_act)
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"position_embedding_type {self.position_embedding_type!r}: expected one of "
                f"{', '.join(POSITION_EMBEDDING_TYPES)}"
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("add_cross_attention needs is_decoder=True: only a decoder attends an encoder's states")
        if not 0 <= self.pad_token_id < min(self.vocab_size, self.max_position_embeddings):
            raise ValueError(f"pad_token_id {self.pad_token_id} has no row in the word and position tables")
        for layer, heads in self.pruned_heads:
            if not 0 <= layer < self.num_hidden_layers or not all(0 <= h < self.num_attention_heads for h in heads):
                raise ValueError(
                    f"pruned_heads names layer {layer}, heads {list(heads)}: the model has "
                    f"{self.num_hidden_layers} layers of {self.num_attention_heads} heads"
                )

    @property
    def head_dim(self) -> int:
        """Width of one head; pruning does not change it."""
        return self.hidden_size // self.num_attention_heads

    def heads_of(self, layer: int) -> int:
        """Attention heads that are left in `layer`."""
        return self.num_attention_heads - len(dict(self.pruned_heads).get(layer, ()))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "AltCLIPTextConfig":
        """From the dictionary of a config.json; ValueError for a value that cannot be."""
        return config_from_hf(cls, data, {"pruned_heads": _pruned_heads})

    def to_hf(self) -> dict[str, Any]:
        """As a dictionary for config.json. What current releases of transformers no longer know is written only
        where it differs from the default."""
        data = config_to_hf(self)
        data["pruned_heads"] = {str(layer): list(heads) for layer, heads in self.pruned_heads}
        seed_era = ("position_embedding_type", "is_decoder", "add_cross_attention")
        for name in seed_era:
            if data[name] == type(self).__dataclass_fields__[name].default:
                del data[name]
        if not data["pruned_heads"]:
            del data["pruned_heads"]
        return data


@dataclasses.dataclass(frozen=True)
class AltCLIPVisionConfig(CLIPVisionConfig):
    """The ViT image tower."""

    model_type: ClassVar[str] = "altclip_vision_model"


@dataclasses.dataclass(frozen=True)
class AltCLIPConfig:
    """Both towers and the space they meet in."""

    model_type: ClassVar[str] = "altclip"

    text_config: AltCLIPTextConfig = AltCLIPTextConfig()
    vision_config: AltCLIPVisionConfig = AltCLIPVisionConfig()
    projection_dim: Size = 768
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "AltCLIPConfig":
        """From the dictionary of a config.json; ValueError for a value that cannot be.

        Early files carry `text_config_dict` and `vision_config_dict` besides; they overrule, as in transformers.
        """
        towers = {"text_config": AltCLIPTextConfig, "vision_config": AltCLIPVisionConfig}
        data = dict(data)
        for name, tower in towers.items():
            data[name] = tower.from_hf(section(data, f"{name}_dict", name))
        return config_from_hf(cls, data, ignore=frozenset({"num_layers"}))

    def to_hf(self) -> dict[str, Any]:
        """As a dictionary for config.json."""
        towers = {"text_config": self.text_config.to_hf(), "vision_config": self.vision_config.to_hf()}
        return config_to_hf(self) | towers
