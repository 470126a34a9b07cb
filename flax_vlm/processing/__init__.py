"""The host side: pictures and texts to numpy arrays. Needs numpy, Pillow and tokenizers, and neither jax nor torch."""

from flax_vlm.processing.altclip import AltCLIPProcessor
from flax_vlm.processing.glm4v import GLM4VProcessor
from flax_vlm.processing.idefics import IdeficsProcessor
from flax_vlm.processing.images import ImageProcessor, load_image
from flax_vlm.processing.tokenizer import TextStream, Tokenizer

# By the family of a model, as `models.registry` names it.
PROCESSORS = {"altclip": AltCLIPProcessor, "glm4v": GLM4VProcessor, "idefics": IdeficsProcessor}

__all__ = [
    "PROCESSORS",
    "AltCLIPProcessor",
    "GLM4VProcessor",
    "IdeficsProcessor",
    "ImageProcessor",
    "TextStream",
    "Tokenizer",
    "load_image",
]
