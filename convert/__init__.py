"""Conversion between PyTorch checkpoints and native ones, both ways.

Imported on first use: what only looks at files (`flax-vlm inspect`) need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ConversionError
    from .inspection import inspect
    from .port import from_state_dict, state_dict, to_flax, to_torch
    from .verification import verify

_HOMES = {
    "ConversionError": ".errors",
    "inspect": ".inspection",
    "verify": ".verification",
    "from_state_dict": ".port",
    "state_dict": ".port",
    "to_flax": ".port",
    "to_torch": ".port",
}

__all__ = ["ConversionError", "from_state_dict", "inspect", "state_dict", "to_flax", "to_torch", "verify"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
