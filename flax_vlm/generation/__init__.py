"""Generating text: greedy search, sampling and beam search in one compiled loop, at once or as a stream."""

from flax_vlm.generation.api import GenerateOutput, Stream, compile_ahead, generate, stream
from flax_vlm.generation.config import GenerationConfig
from flax_vlm.generation.request import bucket_length

__all__ = ["GenerateOutput", "GenerationConfig", "Stream", "bucket_length", "compile_ahead", "generate", "stream"]
