"""N layers run as a loop or as a scan, with a recomputation (remat) policy.

An unrolled loop is the faster program (decoding runs up to 4 times faster: a scan copies each layer's weights out of
the stacked array), a scan compiles in the time of one layer. So inference unrolls and training scans, from the same
code and the same checkpoint: parameters hold one entry a layer (`layers_0`, `layers_1`, ...), or one entry `layers`
with a leading layer axis, and `stack_params` / `unstack_params` turn one into the other.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.layers.attention import ATTENDED
from flax_vlm.layers.kept_weights import KEPT
from flax_vlm.layers.linear import PRODUCT
from flax_vlm.layers.partitioning import HIDDEN, constrain

Remat: TypeAlias = Literal["none", "full", "dots", "dots_no_batch"]

_POLICIES = {
    "full": None,  # recompute everything but the layer's input
    # By name: those of jax look for dot_general, which is inside of functions with gradients of their own.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENDED),
    "dots_no_batch": jax.checkpoint_policies.save_only_these_names(PRODUCT),
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
      carry: hidden states [B, T, D].
      layers: from `make_layers`. What all layers share (masks, encoder states, flags) the body takes from its closure.
      inputs: one pytree a layer (a cache entry, a head mask ...), all of one structure; it sets the number of layers.
      remat: "none" keeps all activations for the backward pass, "full" only each layer's input, "dots_no_batch" also
        the results of products with weights, "dots" those and what attention gives. Scores are never kept by them.

    Returns:
      The final carry and the outputs, one a layer.

    Raises:
      ValueError: for an unknown `remat`.
    """

    def run(layer: Any, states: Any, layer_inputs: Any) -> tuple[Any, Any]:
        states, output = body(layer, constrain(states, HIDDEN), layer_inputs)
        return constrain(states, HIDDEN), output

    if remat != "none":
        if remat not in _POLICIES:
            raise ValueError(f"unknown remat {remat!r}: expected 'none', {', '.join(map(repr, _POLICIES))}")
        run = nn.remat(run, policy=_POLICIES[remat], prevent_cse=not isinstance(layers, nn.Module))

    if not isinstance(layers, nn.Module):
        outputs = []
        for layer, layer_inputs in zip(layers, inputs, strict=True):
            carry, output = run(layer, carry, layer_inputs)
            outputs.append(output)
        return carry, outputs

    length = len(inputs)
    scanned = nn.scan(
        run,
        variable_axes={"params": 0, "intermediates": 0, KEPT: 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    carry, stacked_outputs = scanned(layers, carry, stacked)
    return carry, [jax.tree.map(lambda leaf, i=i: leaf[i], stacked_outputs) for i in range(length)]


def stack_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """`layers_0, layers_1, ...` at any depth become one `layers` with a leading layer axis.

    So does any other name that ends in "layers". Where two kinds of them stand side by side, they are scanned together,
    block by block, and stand under `blocks`: m of one kind and m * k of the other become, with a leading axis of m,
    `blocks/gates_layers` and `blocks/layers_0 ... layers_{k-1}` (`blocks/layers` if k is 1).

    Raises:
      ValueError: where the layers' shapes differ (pruned heads): those cannot be scanned.
    """
    rest: dict[str, Any] = {}
    groups: dict[str, dict[int, Any]] = {}
    for key, value in params.items():
        value = stack_params(value) if isinstance(value, Mapping) else value
        numbered = _NUMBERED.fullmatch(key)
        if numbered:
            groups.setdefault(numbered["name"], {})[int(numbered["number"])] = value
        else:
            rest[key] = value
    blocks = min(map(len, groups.values()), default=0)
    stacked: dict[str, Any] = {}
    for name, layers in groups.items():
        per_block = len(layers) // blocks
        for k in range(per_block):
            members = [layers[i] for i in range(k, len(layers), per_block)]
            if len({str(jax.tree.map(jnp.shape, layer)) for layer in members}) > 1:
                raise ValueError(f"the layers {name}_0 ... differ in shape (pruned heads?): they cannot be scanned")
            key = name if per_block == 1 else f"{name}_{k}"
            stacked[key] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return {**rest, "blocks": stacked} if len(groups) > 1 else {**rest, **stacked}


def unstack_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_params`; parameters that are not stacked stay as they are."""
    unstacked: dict[str, Any] = {}
    for key, value in params.items():
        if key == "blocks":
            unstacked |= _unstack_group(value)
        elif key.endswith("layers"):
            unstacked |= _unstack_group({key: value})
        else:
            unstacked[key] = unstack_params(value) if isinstance(value, Mapping) else value
    return unstacked


def _unstack_group(stacked: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of one scan, each under its own number."""
    found = [_NUMBERED.fullmatch(key) or key for key in stacked]
    members = [(each, 0) if isinstance(each, str) else (each["name"], int(each["number"])) for each in found]
    per_block = Counter(name for name, _ in members)
    layers: dict[str, Any] = {}
    for (name, k), value in zip(members, stacked.values(), strict=True):
        value = unstack_params(value)
        for block in range(jax.tree.leaves(value)[0].shape[0]):
            layers[f"{name}_{block * per_block[name] + k}"] = jax.tree.map(lambda leaf, i=block: leaf[i], value)
    return layers


_NUMBERED = re.compile(r"(?P<name>(?:\w*_)?layers)_(?P<number>[0-9]+)")
