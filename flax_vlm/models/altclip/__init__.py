"""AltCLIP: multilingual CLIP."""

from flax_vlm.models.altclip.config import AltCLIPConfig, AltCLIPTextConfig, AltCLIPVisionConfig
from flax_vlm.models.altclip.model import AltCLIPModel, AltCLIPOutput, AltCLIPTextModel, AltCLIPVisionModel
from flax_vlm.models.altclip.prune import prune_heads
from flax_vlm.models.altclip.roberta import AltRobertaModel

__all__ = [
    "AltCLIPConfig",
    "AltCLIPModel",
    "AltCLIPOutput",
    "AltCLIPTextConfig",
    "AltCLIPTextModel",
    "AltCLIPVisionConfig",
    "AltCLIPVisionModel",
    "AltRobertaModel",
    "prune_heads",
]
