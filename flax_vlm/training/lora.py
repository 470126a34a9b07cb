"""Low-rank adapters (LoRA, arXiv:2106.09685): what is learnt of a kernel [D, F] is a product of [D, r] and [r, F].

A Dense with `lora_a` and `lora_b` beside its kernel gives `x @ kernel + alpha / rank * (x @ lora_a) @ lora_b`. The sum
of the kernels is never formed, so neither is its gradient, and frozen kernels take part as they are. The adapters are
a tree of their own, which trains while all other parameters are frozen:

    adapters = lora.init(config, params, jax.random.key(0))
    model = lora.adapted(model, config)  # takes parameters and adapters as one tree: step.merge(adapters, params)
    params = lora.merged(params, adapters, config)  # for the model as it was: to save, to export

L layers of a scan   D, F widths of a kernel   r rank
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from flax_vlm.layers.linear import Dense, matmul, wide
from flax_vlm.layers.param_tree import flatten_params, unflatten_params

A, B = "lora_a", "lora_b"
# A loss in chunks of the vocabulary takes these kernels apart and would miss an adapter.
_HEADS = re.compile(r"(.*/)?(lm_head|output_layer)/.*")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How large adapters are, and of which kernels.

    Attributes:
      rank: r.
      alpha: what is learnt counts alpha / rank times.
      targets: a regular expression for the whole path of a kernel, "model/layers.*/(q|v)_proj/kernel" say. By default
        queries and values of every attention in every tower.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = r".*/(q_proj|v_proj|query|value)/kernel"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank: expected 1 or more, came {self.rank}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"lora.targets: expected a regular expression, came {self.targets!r}: {error}") from error

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init(config: LoraConfig, params: Mapping[str, Any], rng: Array) -> dict[str, Any]:
    """Adapters for the kernels of `params` that the config names; they change nothing yet, because `lora_b` is zero.

    Layers may be stacked for a scan. With axis names attached (as `abstract_params` gives them, under
    `jax.eval_shape`) the adapters carry names too, so that they are sharded along with their kernels.

    Raises:
      ValueError: where the targets match nothing, or what cannot have an adapter.
    """
    leaves = flatten_params(params)
    adapters: dict[str, Any] = {}
    for path in _targets(config, leaves):
        kernel = nn.meta.unbox(leaves[path])
        *stack, fan_in, fan_out = kernel.shape
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        # As in PEFT: torch's own init of a Linear.
        shape, bound, dtype = (*stack, fan_in, config.rank), fan_in**-0.5, wide(kernel.dtype)
        module = path.removesuffix("kernel")
        adapters[module + A] = _named_as(leaves[path], jax.random.uniform(key, shape, dtype, -bound, bound), axis=-1)
        adapters[module + B] = _named_as(leaves[path], jnp.zeros((*stack, config.rank, fan_out), dtype), axis=-2)
    return unflatten_params(adapters)


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    """`model`, for parameters with adapters beside their kernels."""
    fields = (field.name for field in dataclasses.fields(model) if field.init and field.name not in ("parent", "name"))
    return _with_adapters(type(model), config.scale)(**{name: getattr(model, name) for name in fields})


def merged(params: Mapping[str, Any], adapters: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """The parameters with what was learnt added to their kernels, in the dtype of those.

    Raises:
      ValueError: for an adapter that fits no kernel of `params`.
    """
    leaves, factors = flatten_params(params), flatten_params(adapters)
    for path, factor in factors.items():
        module, _, name = path.rpartition("/")
        if name != A:
            continue
        kernel, delta = leaves.get(f"{module}/kernel"), factor @ factors[f"{module}/{B}"]
        if kernel is None or kernel.shape != delta.shape:
            found = "none" if kernel is None else f"one of shape {kernel.shape}"
            raise ValueError(
                f"{path}: expected a kernel of shape {delta.shape} beside it, found {found}. Are the layers of both "
                "stacked, or of neither, and is it the model that the adapters were trained on?"
            )
        leaves[f"{module}/kernel"] = (kernel + config.scale * delta).astype(kernel.dtype)
    return unflatten_params(leaves)


def _targets(config: LoraConfig, leaves: Mapping[str, Any]) -> list[str]:
    kernels = [path for path in leaves if path.endswith("/kernel")]
    targets = [path for path in kernels if re.fullmatch(config.targets, path)]
    if not targets:
        raise ValueError(
            f"lora.targets: {config.targets!r} matches none of {len(kernels)} kernels: expected a regular expression "
            f"for a whole path such as {kernels[0] if kernels else '...'}"
        )
    for path in targets:
        if _HEADS.fullmatch(path) or nn.meta.unbox(leaves[path]).ndim > (3 if "layers" in path else 2):
            raise ValueError(
                f"lora.targets: {config.targets!r} matches {path}: expected kernels of products with a matrix, no "
                "convolutions and no head over the vocabulary. Write a narrower one"
            )
    return targets


def _named_as(kernel: Any, factor: Array, axis: int) -> Any:
    """`factor` with the axis names of a kernel that has some; its `axis` is the rank, which has none."""
    if not isinstance(kernel, nn.Partitioned):
        return factor
    names = list(kernel.names)
    names[axis] = None
    return dataclasses.replace(kernel, value=factor, names=tuple(names))


@cache
def _with_adapters(kind: type[nn.Module], scale: float) -> type[nn.Module]:
    """A subclass, so that programs compiled for the model itself are not taken for its own."""

    @nn.nowrap
    def apply(self: nn.Module, *args: Any, **options: Any) -> Any:
        with nn.intercept_methods(partial(_add_adapter, scale)):
            return kind.apply(self, *args, **options)

    return type(kind.__name__, (kind,), {"apply": apply, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _add_adapter(
    scale: float, call: Callable[..., Any], args: Any, options: Any, context: nn.module.InterceptorContext
) -> Any:
    output = call(*args, **options)
    dense = context.module
    if not isinstance(dense, Dense) or context.method_name != "__call__" or not dense.has_variable("params", A):
        return output
    a, b = (dense.get_variable("params", name) for name in (A, B))
    inputs = args[0].astype(output.dtype)
    return output + (scale * matmul(matmul(inputs, a), b)).astype(output.dtype)
