"""Which classes a config.json asks for; names of model and config classes are the reference's."""

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from flax import linen as nn


class Family(NamedTuple):
    """The part of a family that `model_type` names, and its model classes by architecture."""

    module: str
    config: str
    architectures: tuple[str, ...]  # the first is taken when the file names none of them


_FAMILIES = {
    "altclip": Family("altclip", "AltCLIPConfig", ("AltCLIPModel",)),
    "altclip_text_model": Family("altclip", "AltCLIPTextConfig", ("AltCLIPTextModel", "AltRobertaModel")),
    "altclip_vision_model": Family("altclip", "AltCLIPVisionConfig", ("AltCLIPVisionModel",)),
}


# Where the parameters of one model stand inside those of another.
_PARTS = {
    "AltCLIPModel": {
        "AltCLIPTextModel": "text_model/",
        "AltCLIPVisionModel": "vision_model/",
        "AltRobertaModel": "text_model/roberta/",
    },
    "AltCLIPTextModel": {"AltRobertaModel": "roberta/"},
}


def family(model_type: Any) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
      ValueError: for one that is not known.
    """
    if model_type not in _FAMILIES:
        raise ValueError(f"config.json: model_type is {model_type!r}: expected one of {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]


def read_config(data: Mapping[str, Any]) -> Any:
    """The config object of a config.json dictionary; ValueError where it cannot be read."""
    entry = family(data.get("model_type"))
    return getattr(_module(entry), entry.config).from_hf(data)


def model_class(config: Any, architectures: Any = ()) -> type[nn.Module]:
    """The model class for a config: the first of `architectures` (as in config.json) that belongs to its family."""
    entry = family(config.model_type)
    named = [name for name in architectures or () if name in entry.architectures]
    return getattr(_module(entry), (named or entry.architectures)[0])


def config_for(model: type[nn.Module], config: Any) -> Any:
    """`config`, or the part of it that `model` takes: a tower's own config out of the whole.

    Raises:
      ValueError: when neither fits.
    """
    candidates = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))]
    for candidate in candidates:
        if candidate is not None and model.__name__ in family(candidate.model_type).architectures:
            return candidate
    raise ValueError(f"a {type(config).__name__} holds no {model.__name__}")


def build(model: type[nn.Module], config: Any, paths: Iterable[str]) -> nn.Module:
    """The module for `config` whose parameters stand at `paths`: they say what the config does not (a pooler, say)."""
    options = getattr(model, "options_from_params", None)
    return model(config, **(options(set(paths)) if options else {}))


def wholes_of(part: str) -> dict[str, str]:
    """The models that contain the model named `part`, and the path of its parameters there."""
    return {whole: parts[part] for whole, parts in _PARTS.items() if part in parts}


@cache
def _module(entry: Family) -> Any:
    return importlib.import_module(f"flax_vlm.models.{entry.module}")
