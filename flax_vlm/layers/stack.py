"""N layers run as a loop or as a scan, with a recomputation (remat) policy.

An unrolled loop is the faster program (decoding runs up to 4 times faster: a scan copies each layer's weights out of
the stacked array), a scan compiles in the time of one layer. So inference unrolls and training scans, from the same
code and the same checkpoint: parameters hold one entry a layer (`layers_0`, `layers_1`, ...), or one entry `layers`
with a leading layer axis, and `stack_params` / `unstack_params` turn one into the other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

Remat: TypeAlias = Literal["none", "full", "dots", "dots_no_batch"]

_POLICIES = {
    "full": None,  # recompute everything but the layer's input
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def make_layers(layer: Callable[[int], nn.Module], num_layers: int, scan: bool) -> list[nn.Module] | nn.Module:
    """The layers for `run_layers`, to be assigned in `setup`: a list, or with `scan` the one that is scanned."""
    return layer(0) if scan else [layer(i) for i in range(num_layers)]


def run_layers(
    layers: Sequence[nn.Module] | nn.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Sequence[Any],
    remat: Remat = "none",
) -> tuple[Any, list[Any]]:
    """`carry, output = body(layer, carry, inputs[i])` for every layer i.

    Args:
      layers: from `make_layers`. What all layers share (masks, encoder states, flags) the body takes from its closure.
      inputs: one pytree a layer (a cache entry, a head mask ...), all of one structure; it sets the number of layers.
      remat: "none" keeps all activations for the backward pass, "full" only each layer's input, "dots" also the
        results of matrix products, "dots_no_batch" only of those with weights (not of attention scores).

    Returns:
      The final carry and the outputs, one a layer.

    Raises:
      ValueError: for an unknown `remat`.
    """
    if remat != "none":
        if remat not in _POLICIES:
            raise ValueError(f"unknown remat {remat!r}: expected 'none', {', '.join(map(repr, _POLICIES))}")
        body = nn.remat(body, policy=_POLICIES[remat], prevent_cse=not isinstance(layers, nn.Module))

    if not isinstance(layers, nn.Module):
        outputs = []
        for layer, layer_inputs in zip(layers, inputs, strict=True):
            carry, output = body(layer, carry, layer_inputs)
            outputs.append(output)
        return carry, outputs

    length = len(inputs)
    scanned = nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    carry, stacked_outputs = scanned(layers, carry, stacked)
    return carry, [jax.tree.map(lambda leaf, i=i: leaf[i], stacked_outputs) for i in range(length)]


def stack_params(params: Mapping[str, Any], names: Sequence[str] = ("layers",)) -> dict[str, Any]:
    """`layers_0, layers_1, ...` at any depth become one `layers` with a leading layer axis.

    Raises:
      ValueError: where the layers' shapes differ (pruned heads): those cannot be scanned.
    """
    stacked: dict[str, Any] = {}
    groups: dict[str, dict[int, Any]] = {name: {} for name in names}
    for key, value in params.items():
        name, _, number = key.rpartition("_")
        value = stack_params(value, names) if isinstance(value, Mapping) else value
        if name in groups and number.isdigit():
            groups[name][int(number)] = value
        else:
            stacked[key] = value
    for name, layers in groups.items():
        if layers:
            ordered = [layers[i] for i in range(len(layers))]
            if len({str(jax.tree.map(jnp.shape, layer)) for layer in ordered}) > 1:
                raise ValueError(f"the layers {name}_0 ... differ in shape (pruned heads?): they cannot be scanned")
            stacked[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return stacked


def unstack_params(params: Mapping[str, Any], names: Sequence[str] = ("layers",)) -> dict[str, Any]:
    """The inverse of `stack_params`; parameters that are not stacked stay as they are."""
    unstacked: dict[str, Any] = {}
    for key, value in params.items():
        value = unstack_params(value, names) if isinstance(value, Mapping) else value
        if key in names:
            for i in range(jax.tree.leaves(value)[0].shape[0]):
                unstacked[f"{key}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
        else:
            unstacked[key] = value
    return unstacked
