"""Removing attention heads for good (Michel et al., arXiv:1905.10650)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from flax_vlm.models.altclip.config import AltCLIPConfig, AltCLIPTextConfig

Config = TypeVar("Config", AltCLIPConfig, AltCLIPTextConfig)


def prune_heads(
    config: Config, params: Mapping[str, Any], heads_to_prune: Mapping[int, Sequence[int]]
) -> tuple[Config, dict[str, Any]]:
    """`config` and `params` without the given self-attention heads of the text tower, {layer: [heads]}.

    Heads are numbered as in the unpruned model; those already gone are passed over. The result computes what a head
    mask of zeros computes. `params` are those of AltRobertaModel, AltCLIPTextModel or AltCLIPModel, one entry a layer.

    Raises:
      ValueError: for a layer or head that does not exist, or stacked (scanned) parameters.
    """
    if isinstance(config, AltCLIPConfig):
        text_config, text = _prune_text(config.text_config, params["text_model"], heads_to_prune)
        return dataclasses.replace(config, text_config=text_config), {**params, "text_model": text}
    return _prune_text(config, params, heads_to_prune)


def _prune_text(
    config: AltCLIPTextConfig, params: Mapping[str, Any], heads_to_prune: Mapping[int, Sequence[int]]
) -> tuple[AltCLIPTextConfig, dict[str, Any]]:
    if "roberta" in params:
        pruned, roberta = _prune_text(config, params["roberta"], heads_to_prune)
        return pruned, {**params, "roberta": roberta}

    encoder = dict(params["encoder"])
    if "layers" in encoder:
        raise ValueError("these parameters are stacked for a scan: use layers.stack.unstack_params first")
    gone = dict(config.pruned_heads)
    after = {layer: tuple(sorted({*gone.get(layer, ()), *heads})) for layer, heads in heads_to_prune.items()}
    pruned_heads = tuple(sorted((layer, heads) for layer, heads in {**gone, **after}.items() if heads))
    pruned = dataclasses.replace(config, pruned_heads=pruned_heads)  # refuses layers and heads that do not exist

    for layer, heads in after.items():
        here = [head for head in range(config.num_attention_heads) if head not in gone.get(layer, ())]
        kept = [place for place, head in enumerate(here) if head not in heads]
        channels = np.arange(len(here) * config.head_dim).reshape(len(here), -1)[kept].ravel()
        encoder[f"layers_{layer}"] = _keep(encoder[f"layers_{layer}"], channels)
    return pruned, {**params, "encoder": encoder}


def _keep(layer: Mapping[str, Any], channels: np.ndarray) -> dict[str, Any]:
    """The layer with only these channels between its query/key/value and its output projection."""
    attention = layer["attention"]
    projections = {
        name: {leaf: value[..., channels] for leaf, value in attention["self"][name].items()}
        for name in ("query", "key", "value")
    }
    output = attention["output"]
    dense = {**output["dense"], "kernel": output["dense"]["kernel"][channels]}
    attention = {"self": {**attention["self"], **projections}, "output": {**output, "dense": dense}}
    return {**layer, "attention": attention}
