"""Which classes a config.json asks for; names of model and config classes are the reference's."""

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from reprlib import repr as shortened
from typing import Any, NamedTuple, TypeVar

from flax import linen as nn

from flax_vlm.models.config import layers_of

Leaf = TypeVar("Leaf")


class Family(NamedTuple):
    """The part of a family that `model_type` names, and its model classes by architecture."""

    module: str
    config: str
    architectures: tuple[str, ...]  # the first is taken when the file names none of them


_FAMILIES = {
    "altclip": Family("altclip", "AltCLIPConfig", ("AltCLIPModel",)),
    "altclip_text_model": Family("altclip", "AltCLIPTextConfig", ("AltCLIPTextModel", "AltRobertaModel")),
    "altclip_vision_model": Family("altclip", "AltCLIPVisionConfig", ("AltCLIPVisionModel",)),
    "chatglm": Family(
        "glm4v", "GLM4VConfig", ("GLM4VForConditionalGeneration", "GLM4VModel", "GLM4VForCausalLM", "EVA2CLIPModel")
    ),
    "glm": Family("glm4v", "GLM4VConfig", ("GLM4VForConditionalGeneration",)),  # transformers' port of the decoder
    "idefics": Family(
        "idefics", "IdeficsConfig", ("IdeficsForVisionText2Text", "IdeficsModel", "IdeficsPerceiverResampler")
    ),
    "idefics_vision": Family("idefics", "IdeficsVisionConfig", ("IdeficsVisionModel",)),
}

# Layers that are built, in seconds, even where the checkpoint cannot fill them: each parameter can then be named.
_ALWAYS_BUILT = 200

# Where the parameters of one model stand inside those of another.
_PARTS = {
    "AltCLIPModel": {
        "AltCLIPTextModel": "text_model/",
        "AltCLIPVisionModel": "vision_model/",
        "AltRobertaModel": "text_model/roberta/",
    },
    "AltCLIPTextModel": {"AltRobertaModel": "roberta/"},
    "GLM4VForConditionalGeneration": {"GLM4VModel": "transformer/", "EVA2CLIPModel": "transformer/vision/"},
    "GLM4VModel": {"EVA2CLIPModel": "vision/"},
    "IdeficsForVisionText2Text": {
        "IdeficsModel": "model/",
        "IdeficsVisionModel": "model/vision_model/",
        "IdeficsPerceiverResampler": "model/perceiver_resampler/",
    },
    "IdeficsModel": {
        "IdeficsVisionModel": "vision_model/",
        "IdeficsPerceiverResampler": "perceiver_resampler/",
    },
}


_TOWERS = {
    "AltCLIPModel": {"text": "AltCLIPTextModel", "vision": "AltCLIPVisionModel"},
    "GLM4VForConditionalGeneration": {"text": "GLM4VForCausalLM", "vision": "EVA2CLIPModel"},
    "GLM4VModel": {"vision": "EVA2CLIPModel"},
    "IdeficsForVisionText2Text": {"vision": "IdeficsVisionModel"},
    "IdeficsModel": {"vision": "IdeficsVisionModel"},
}


def tower(whole: type[nn.Module], name: str) -> type[nn.Module]:
    """The class of the "text" or "vision" tower of `whole`; ValueError where it has none."""
    towers = _TOWERS.get(whole.__name__, {})
    if name not in towers:
        raise ValueError(f"{whole.__name__} has no {name} tower: expected one of {', '.join(towers) or 'none'}")
    return getattr(importlib.import_module(whole.__module__.rpartition(".")[0]), towers[name])


def family(model_type: Any) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
      ValueError: for one that is not known.
    """
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ValueError(f"config.json: model_type is {shortened(model_type)}: expected one of {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]


def read_config(data: Mapping[str, Any]) -> Any:
    """The config object of a config.json dictionary; ValueError where it cannot be read."""
    entry = family(data.get("model_type"))
    return getattr(_module(entry), entry.config).from_hf(data)


def model_class(config: Any, architectures: Any = ()) -> type[nn.Module]:
    """The model class for a config: the first of `architectures` (as in config.json) that belongs to its family."""
    entry = family(config.model_type)
    if architectures is not None and not isinstance(architectures, list | tuple):
        raise ValueError(f"config.json: architectures is {shortened(architectures)}: expected a list of names")
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
            config_from = getattr(model, "config_from", None)
            return config_from(candidate) if config_from else candidate
    raise ValueError(f"a {type(config).__name__} holds no {model.__name__}")


def build(model: type[nn.Module], config: Any, paths: Iterable[str]) -> nn.Module:
    """The module for `config` whose parameters stand at `paths`: they say what the config does not (a pooler, say).

    Raises:
      ValueError: for many more layers than there are parameters, before minutes are spent on building them.
    """
    paths = set(paths)
    if layers_of(config) > max(len(paths), _ALWAYS_BUILT):
        raise ValueError(
            f"config.json asks for {layers_of(config)} layers, the checkpoint holds {len(paths)} parameters in all. "
            "Is it the file that came with the weights?"
        )
    options = getattr(model, "options_from_params", None)
    return model(config, **(options(paths) if options else {}))


class Place(NamedTuple):
    """Where a part's parameters stand in a whole."""

    prefix: str
    left_out: tuple[str, ...] = ()  # what stands there and is not the part's

    def inside(self, tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """Those of the part, by its own paths."""
        own = (path for path in tensors if path.startswith(self.prefix) and not path.startswith(self.left_out))
        return {path.removeprefix(self.prefix): tensors[path] for path in own}


def place_in(part: type[nn.Module], whole: type[nn.Module]) -> Place | None:
    """Where the parameters of `part` stand in `whole`; None where it has no such part."""
    if part is whole:
        return Place("")
    if issubclass(part, whole):  # the whole without some of it
        return Place("", getattr(part, "left_out", ()))
    prefix = wholes_of(part.__name__).get(whole.__name__)
    return None if prefix is None else Place(prefix)


def wholes_of(part: str) -> dict[str, str]:
    """The models that contain the model named `part`, and the path of its parameters there."""
    return {whole: parts[part] for whole, parts in _PARTS.items() if part in parts}


@cache
def _module(entry: Family) -> Any:
    return importlib.import_module(f"flax_vlm.models.{entry.module}")
