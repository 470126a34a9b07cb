"""Conversion between PyTorch checkpoints and native ones, both ways.

Imported on first use: what only looks at files (`flax-vlm inspect`) need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ConversionError
    from .port import from_state_dict, state_dict, to_flax, to_torch

_HOMES = {
    "ConversionError": ".errors",
    "from_state_dict": ".port",
    "state_dict": ".port",
    "to_flax": ".port",
    "to_torch": ".port",
}

__all__ = ["ConversionError", "from_state_dict", "state_dict", "to_flax", "to_torch"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
