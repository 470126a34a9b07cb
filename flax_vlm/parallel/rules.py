"""From the names of axes to shardings.

Modules name the axes of their parameters and of their large activations and know no mesh; `Rules` say which axes of the
mesh, `data`, `fsdp` and `tensor`, split each. Under `use(mesh, rules)` activations follow them.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger("flax_vlm")

Axes: TypeAlias = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """The mesh axes that split an axis of each name; None leaves it whole.

    Where two names of one array want the same mesh axis, the one that stands first here gets it.
    """

    batch: Axes = ("data", "fsdp")  # rows: of tokens, of pictures
    heads: Axes = None  # attention heads, whole ones
    head_dim: Axes = None
    mlp: Axes = None  # inner width of a feed-forward
    vocab: Axes = None
    embed: Axes = None  # model width, of parameters
    length: Axes = None  # tokens of states between layers; "tensor" is sequence parallelism
    project: Axes = None  # width of a space that two towers share
    layers: Axes = None  # of a scan
    replicate_below: int = 2**14  # elements in a layer: norms, biases and gates are not worth gathering

    @property
    def table(self) -> tuple[tuple[str, Axes], ...]:
        """As linen takes them."""
        return tuple(
            (field.name, getattr(self, field.name)) for field in fields(self) if field.name != "replicate_below"
        )

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """How an array is split whose axes have these names.

        Raises:
          ValueError: for a name without a rule.
        """
        known = [name for name, _ in self.table]
        unknown = [name for name in names if name is not None and name not in known]
        if unknown:
            raise ValueError(f"no rule for an axis named {unknown[0]!r}: expected one of {', '.join(known)}")
        spec = logical_to_mesh_axes(names, self.table)
        assert spec is not None, "names were given"
        return spec


# Every device holds all parameters, and rows of its own.
REPLICATED = Rules()
# Parameters are split along the model width, and gathered where they are used.
FSDP = Rules(embed="fsdp")
# Heads, feed-forward width and vocabulary are split as well, and so is the work on them.
FSDP_TENSOR = Rules(embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor")

PRESETS = {"replicated": REPLICATED, "fsdp": FSDP, "fsdp_tensor": FSDP_TENSOR}


def find_rules(rules: Rules | str) -> Rules:
    """The preset of that name; rules stay as they are.

    Raises:
      ValueError: for an unknown name.
    """
    if isinstance(rules, Rules):
        return rules
    if rules not in PRESETS:
        raise ValueError(f"unknown rules {rules!r}: expected {', '.join(map(repr, PRESETS))}, or a parallel.Rules")
    return PRESETS[rules]


# Linen's rules are no part of what jit looks programs up by; this is, so that other rules make another program.
_rules_in_effect: Any = jax.make_user_context(None)


@contextmanager
def use(mesh: Mesh, rules: Rules | str = FSDP_TENSOR) -> Iterator[None]:
    """Mesh and rules in effect: programs that are compiled within split their activations by them."""
    rules = find_rules(rules)
    _check(mesh, rules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.table), _rules_in_effect(rules):
        yield


def shardings(boxed: Any, mesh: Mesh, rules: Rules | str = FSDP_TENSOR) -> Any:
    """A NamedSharding for every parameter of `jax.eval_shape(model.init, ...)["params"]` (names still attached).

    An axis that the mesh axes do not divide evenly stays whole. So do parameters of fewer than `rules.replicate_below`
    elements in a layer; a log line says how many.

    Raises:
      ValueError: for parameters without names, or with one that has no rule; all are listed.
    """
    rules = find_rules(rules)
    _check(mesh, rules)
    faults: list[str] = []
    small: list[int] = []

    def place(path: Any, leaf: Any) -> NamedSharding:
        # Not through `unbox`, which would place the leaf where a mesh is in effect already.
        names, leaf = (leaf.names, leaf.value) if isinstance(leaf, nn.LogicallyPartitioned) else ((), leaf)
        shape = leaf.shape
        size = math.prod(length for name, length in zip(names, shape, strict=False) if name != "layers")
        spec = PartitionSpec()
        try:
            if len(names) != len(shape) or (size > 1 and not {*names} - {None, "layers"}):
                raise ValueError(f"its axes {shape} have the names {names}: expected one each, not all of them None")
            spec = _dividing(rules.spec(names), shape, mesh)
        except ValueError as error:
            faults.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {error}")
        if size < rules.replicate_below and any(spec):
            small.append(math.prod(shape))
            spec = PartitionSpec()
        return NamedSharding(mesh, spec)

    placed = jax.tree_util.tree_map_with_path(place, boxed, is_leaf=nn.meta.is_axis_metadata)
    if faults:
        listed = "\n  ".join(faults[:10])
        raise ValueError(f"{len(faults)} parameters cannot be placed on a mesh:\n  {listed}")
    if small:
        logger.info(
            "%d parameters of fewer than %d elements in a layer stay whole on every device, %d elements in all",
            len(small),
            rules.replicate_below,
            sum(small),
        )
    return placed


def _check(mesh: Mesh, rules: Rules) -> None:
    """Mesh and rules belong together."""
    named = {axis for _, axes in rules.table for axis in _tuple(axes)}
    if not named <= set(mesh.axis_names) or AxisType.Explicit in mesh.axis_types:
        raise ValueError(f"{mesh}: expected one of parallel.make_mesh, whose axes the rules name, all of them Auto")
    idle = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in named}
    if idle:
        raise ValueError(
            f"the mesh has {idle}, which {rules} do not use: devices along it would do the same work. Make it 1, or "
            "choose other rules"
        )


def _tuple(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _dividing(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """`spec` without the mesh axes that do not divide an axis of `shape` evenly."""
    ways = [math.prod(mesh.shape[axis] for axis in _tuple(axes)) for axes in spec]
    return PartitionSpec(*(axes if size % n == 0 else None for axes, size, n in zip(spec, shape, ways, strict=True)))
