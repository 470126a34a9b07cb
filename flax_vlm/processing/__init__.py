"""The host side: pictures and texts to numpy arrays. Needs numpy, Pillow and tokenizers, and neither jax nor torch."""

from pathlib import Path
from typing import TypeAlias

from flax_vlm.processing.altclip import AltCLIPProcessor
from flax_vlm.processing.images import ImageProcessor, load_image
from flax_vlm.processing.tokenizer import Tokenizer, read_json

__all__ = ["AltCLIPProcessor", "ImageProcessor", "Processor", "Tokenizer", "load_image", "load_processor"]

Processor: TypeAlias = AltCLIPProcessor | ImageProcessor | Tokenizer

_TEXT_FILES = ("tokenizer.json", "sentencepiece.bpe.model")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(folder: str | Path) -> Processor | None:
    """What the files of a checkpoint folder allow: texts and images, one of them, or nothing (None)."""
    folder = Path(folder)
    texts = any((folder / name).is_file() for name in _TEXT_FILES)
    images = any((folder / name).is_file() for name in _IMAGE_FILES)
    if texts and images:
        return AltCLIPProcessor.from_dir(folder)
    if texts:
        return Tokenizer.from_dir(folder)
    return ImageProcessor.from_hf(read_json(folder / _IMAGE_FILES[0])) if images else None
