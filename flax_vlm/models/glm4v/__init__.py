"""GLM-4V-9B: a picture and text to text."""

from flax_vlm.models.glm4v.config import GLM4VConfig, GLM4VVisionConfig
from flax_vlm.models.glm4v.image_attention import image_attention
from flax_vlm.models.glm4v.model import (
    GLM4VCausalLMOutput,
    GLM4VForCausalLM,
    GLM4VForConditionalGeneration,
    GLM4VModel,
    GLM4VOutput,
)
from flax_vlm.models.glm4v.vision import EVA2CLIPModel
from flax_vlm.models.rollout import ImageAttention

__all__ = [
    "EVA2CLIPModel",
    "GLM4VCausalLMOutput",
    "GLM4VConfig",
    "GLM4VForCausalLM",
    "GLM4VForConditionalGeneration",
    "GLM4VModel",
    "GLM4VOutput",
    "GLM4VVisionConfig",
    "ImageAttention",
    "image_attention",
]
