"""The CLIP image tower (Radford et al., arXiv:2103.00020), shared by AltCLIP and IDEFICS."""

from flax_vlm.models.clip_vision.config import CLIPVisionConfig
from flax_vlm.models.clip_vision.model import CLIPVisionTransformer

__all__ = ["CLIPVisionConfig", "CLIPVisionTransformer"]
