"""IDEFICS: interleaved images and text to text."""

from flax_vlm.models.idefics.config import IdeficsConfig, IdeficsPerceiverConfig, IdeficsVisionConfig
from flax_vlm.models.idefics.freezing import trainable
from flax_vlm.models.idefics.image_attention import image_attention
from flax_vlm.models.idefics.model import (
    IdeficsCausalLMOutput,
    IdeficsForVisionText2Text,
    IdeficsModel,
    IdeficsOutput,
    IdeficsPerceiverResampler,
    IdeficsVisionModel,
)
from flax_vlm.models.rollout import ImageAttention

__all__ = [
    "IdeficsCausalLMOutput",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsModel",
    "IdeficsOutput",
    "IdeficsPerceiverConfig",
    "IdeficsPerceiverResampler",
    "IdeficsVisionConfig",
    "IdeficsVisionModel",
    "ImageAttention",
    "image_attention",
    "trainable",
]
