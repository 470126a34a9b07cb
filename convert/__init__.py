"""Conversion between PyTorch checkpoints and native ones, both ways."""

from .errors import ConversionError
from .port import from_state_dict, state_dict, to_flax, to_torch

__all__ = ["ConversionError", "from_state_dict", "state_dict", "to_flax", "to_torch"]
