"""Which parameters of IDEFICS train (transformers' `freeze_*` options)."""

from collections.abc import Mapping
from typing import Any

from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.models.idefics.config import IdeficsConfig

# The last name of a parameter, and the torch class of the module it belongs to. RMSNorm is none that can be excepted.
_LINEAR = "kernel"


def trainable(config: IdeficsConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` of any model of the family (or their shapes), with True where the reference would train.

    Frozen by `freeze_text_layers` are the decoder layers, the final norm and the main embedding; by
    `freeze_vision_layers` the image tower; by `freeze_lm_head` the main head. The resampler, the gated layers and the
    additional tokens always train, and modules of an excepted class do again.
    """
    return unflatten_params({path: not _frozen(config, path) for path in flatten_params(params)})


def _frozen(config: IdeficsConfig, path: str) -> bool:
    parts = path.removeprefix("model/").split("/")
    if parts[0] == "lm_head":
        return config.freeze_lm_head and parts[1] == "kernel"
    if parts[0] == "embed_tokens":
        # A tied head is the same tensor: freezing either freezes both.
        tied = config.tie_word_embeddings and config.freeze_lm_head
        return (config.freeze_text_layers or tied) and parts[1] == "embedding"
    if parts[0] == "vision_model":
        return config.freeze_vision_layers and _module(parts) not in config.freeze_vision_module_exceptions
    in_decoder = parts[0] == "norm" or any(part.startswith("layers") for part in parts[:2])
    return config.freeze_text_layers and in_decoder and _module(parts) not in config.freeze_text_module_exceptions


def _module(parts: list[str]) -> str:
    """The torch class of the module that holds a parameter, as far as it can be excepted."""
    *_, parent, name = parts
    if parent.startswith(("layer_norm", "pre_layrnorm", "post_layernorm")) and "vision_model" in parts:
        return "LayerNorm"
    if name == "position_embedding":
        return "Embedding"
    if parent == "patch_embedding" or name == "class_embedding" or parent.endswith("norm"):
        return ""
    return "Linear"
