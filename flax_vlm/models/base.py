"""What every part of a model is given: its config, the dtypes, and how to run."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from flax_vlm.layers.attention import Implementation
from flax_vlm.layers.stack import Remat


class Block(nn.Module):
    """A part of a model: `dtype` is that of its computation, `param_dtype` that of its parameters."""

    config: Any
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention_implementation: Implementation = "auto"

    @property
    def dtypes(self) -> dict[str, Any]:
        """For the layers inside."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def run(self) -> dict[str, Any]:
        """For the parts inside."""
        return {**self.dtypes, "attention_implementation": self.attention_implementation}


class Tower(Block):
    """A part with a stack of layers inside: `scan_layers` and `remat` say how `layers.stack` runs it."""

    scan_layers: bool = False
    remat: Remat = "none"

    @property
    def run_stack(self) -> dict[str, Any]:
        """For the towers inside."""
        return {**self.run, "scan_layers": self.scan_layers, "remat": self.remat}
