"""Which parameters of IDEFICS train (transformers' `freeze_*` options)."""

from collections.abc import Mapping
from typing import Any

from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.models.idefics.config import IdeficsConfig


def trainable(config: IdeficsConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` of the whole model or `IdeficsModel` (or their shapes), with True where the reference would train.

    Frozen by `freeze_text_layers` are the decoder layers, the final norm and the main embedding; by
    `freeze_vision_layers` the image tower; by `freeze_lm_head` the main head, unless it is tied: then it is the
    embedding. The resampler, the gated layers and the additional tokens always train, and modules of an excepted class
    do again. Layers may be stacked for a scan.
    """
    return unflatten_params({path: not _frozen(config, path) for path in flatten_params(params)})


def _frozen(config: IdeficsConfig, path: str) -> bool:
    parts = path.removeprefix("model/").removeprefix("blocks/").split("/")
    if parts[0] == "lm_head":
        return config.freeze_lm_head and parts[1] == "kernel"
    if parts[0] == "embed_tokens":
        return config.freeze_text_layers and parts[1] == "embedding"
    if parts[0] == "vision_model":
        return config.freeze_vision_layers and _vision_class(*parts[-2:]) not in config.freeze_vision_module_exceptions
    if parts[0] == "norm" or parts[0].startswith("layers"):
        # The norms are RMSNorms, which cannot be excepted.
        kind = "Linear" if parts[-1] == "kernel" else ""
        return config.freeze_text_layers and kind not in config.freeze_text_module_exceptions
    return False


def _vision_class(module: str, name: str) -> str:
    """The torch class of a module of the image tower, where it is one that can be excepted."""
    if name == "position_embedding":
        return "Embedding"
    if module == "patch_embedding" or name == "class_embedding":
        return ""
    return "LayerNorm" if "norm" in module else "Linear"
