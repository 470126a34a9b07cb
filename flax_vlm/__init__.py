"""flax_vlm: IDEFICS, AltCLIP and GLM-4V in JAX, with converters from and to PyTorch checkpoints.

    import flax_vlm

    vlm = flax_vlm.from_pretrained("path or hub id")  # a PyTorch checkpoint or a converted one
    out = vlm(**vlm.processor(text=["a cat", "a dog"], images=image))

Everything is imported on first use, so that `import flax_vlm` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_vlm.chat import ChatSession
    from flax_vlm.generation import GenerationConfig
    from flax_vlm.models.altclip import (
        AltCLIPConfig,
        AltCLIPModel,
        AltCLIPTextConfig,
        AltCLIPTextModel,
        AltCLIPVisionConfig,
        AltCLIPVisionModel,
        AltRobertaModel,
    )
    from flax_vlm.models.glm4v import (
        EVA2CLIPModel,
        GLM4VConfig,
        GLM4VForCausalLM,
        GLM4VForConditionalGeneration,
        GLM4VModel,
        GLM4VVisionConfig,
    )
    from flax_vlm.models.idefics import (
        IdeficsConfig,
        IdeficsForVisionText2Text,
        IdeficsModel,
        IdeficsPerceiverConfig,
        IdeficsPerceiverResampler,
        IdeficsVisionConfig,
        IdeficsVisionModel,
    )
    from flax_vlm.pretrained import VLM, from_pretrained

__version__ = "0.1.0"

_ALTCLIP = "flax_vlm.models.altclip"
_GLM4V = "flax_vlm.models.glm4v"
_IDEFICS = "flax_vlm.models.idefics"
_HOMES = {
    "AltCLIPConfig": _ALTCLIP,
    "AltCLIPModel": _ALTCLIP,
    "AltCLIPTextConfig": _ALTCLIP,
    "AltCLIPTextModel": _ALTCLIP,
    "AltCLIPVisionConfig": _ALTCLIP,
    "AltCLIPVisionModel": _ALTCLIP,
    "AltRobertaModel": _ALTCLIP,
    "ChatSession": "flax_vlm.chat",
    "EVA2CLIPModel": _GLM4V,
    "GLM4VConfig": _GLM4V,
    "GLM4VForCausalLM": _GLM4V,
    "GLM4VForConditionalGeneration": _GLM4V,
    "GLM4VModel": _GLM4V,
    "GLM4VVisionConfig": _GLM4V,
    "GenerationConfig": "flax_vlm.generation",
    "IdeficsConfig": _IDEFICS,
    "IdeficsForVisionText2Text": _IDEFICS,
    "IdeficsModel": _IDEFICS,
    "IdeficsPerceiverConfig": _IDEFICS,
    "IdeficsPerceiverResampler": _IDEFICS,
    "IdeficsVisionConfig": _IDEFICS,
    "IdeficsVisionModel": _IDEFICS,
    "VLM": "flax_vlm.pretrained",
    "from_pretrained": "flax_vlm.pretrained",
}
_MODULES = ("checkpoint", "convert", "generation", "layers", "models", "parallel", "pretrained", "processing")

__all__ = [
    "VLM",
    "AltCLIPConfig",
    "AltCLIPModel",
    "AltCLIPTextConfig",
    "AltCLIPTextModel",
    "AltCLIPVisionConfig",
    "AltCLIPVisionModel",
    "AltRobertaModel",
    "ChatSession",
    "EVA2CLIPModel",
    "GLM4VConfig",
    "GLM4VForCausalLM",
    "GLM4VForConditionalGeneration",
    "GLM4VModel",
    "GLM4VVisionConfig",
    "GenerationConfig",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsPerceiverResampler",
    "IdeficsVisionConfig",
    "IdeficsVisionModel",
    "from_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"flax_vlm.{name}")
    raise AttributeError(f"module 'flax_vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
