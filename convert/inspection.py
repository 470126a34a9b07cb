"""What is in a checkpoint, told from its headers alone: no weight is read, and neither JAX nor Orbax is imported.

`inspect` looks at one checkpoint, PyTorch's or native; `compare` at two.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from flax_vlm import checkpoint

from .errors import SHOWN, ConversionError
from .provenance import read_provenance
from .torch_files import TensorInfo, TorchFiles

Kind = Literal["PyTorch", "native"]

SEPARATOR = {"PyTorch": ".", "native": "/"}
DEEPEST = 64  # modules within modules; a name that has more, as only a forged one does, keeps its rest in one piece


@dataclass
class Module:
    """A place in the tree of names: the tensor at it, what stands below, and how much that is together."""

    name: str = ""  # of the tensor, in full
    tensor: TensorInfo | None = None
    children: dict[str, "Module"] = field(default_factory=dict)
    size: int = 0  # numbers, those of buffers included
    nbytes: int = 0

    @cached_property
    def contents(self) -> Any:
        """Equal for modules that hold the same names, shapes and dtypes."""
        own = self.tensor and (self.tensor.shape, self.tensor.dtype.name)
        return own, sorted((name, child.contents) for name, child in self.children.items())


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
      config: config.json; empty where there is none.
      tensors: by name, in the order of the files; parameters of a native checkpoint have its params/ for a file.
      provenance: conversion.json of a converted checkpoint: its source's files and their sizes, the converter's
        version, and each parameter's hash.
    """

    path: Path
    kind: Kind
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    provenance: dict[str, Any] | None

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors there are of each dtype, the most frequent first."""
        return dict(Counter(tensor.dtype.name for tensor in self.tensors.values()).most_common())

    @property
    def files(self) -> dict[str, int]:
        """Where the tensors are, with the bytes of those in each."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[_file(tensor)] += tensor.nbytes
        return dict(sizes)

    @cached_property
    def recorded(self) -> dict[str, dict[str, str]]:
        """What conversion.json says of each parameter, by our path; empty without one."""
        return (self.provenance or {}).get("parameters", {})

    def hashes(self) -> dict[str, str]:
        """The recorded hashes, by the names of this checkpoint; of a fused tensor those of its parts."""
        found: dict[str, list[str]] = {}
        for path, each in self.recorded.items():
            found.setdefault(path if self.kind == "native" else each["torch"], []).append(each["sha256"])
        return {name: " ".join(hashes) for name, hashes in found.items()}

    @cached_property
    def tree(self) -> Module:
        """All modules and tensors, by the parts of their names."""
        root = Module()
        for name, tensor in self.tensors.items():
            nodes = [root]
            for part in name.split(SEPARATOR[self.kind], DEEPEST):
                nodes.append(nodes[-1].children.setdefault(part, Module()))
            nodes[-1].name, nodes[-1].tensor = name, tensor
            for node in nodes:
                node.size += math.prod(tensor.shape)
                node.nbytes += tensor.nbytes
        return root

    def modules(self, depth: int | None = None) -> dict[str, Module]:
        """Every module that has others or tensors in it, by its full name, down to `depth`."""
        found: dict[str, Module] = {}

        def walk(node: Module, path: tuple[str, ...]) -> None:
            for name, child in node.children.items():
                if child.children and (depth is None or len(path) < depth):
                    found[SEPARATOR[self.kind].join([*path, name])] = child
                    walk(child, (*path, name))

        walk(self.tree, ())
        return found

    def to_json(self, depth: int | None = None) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "config": self.config,
            "parameters": self.tree.size,
            "bytes": self.tree.nbytes,
            "dtypes": self.dtypes,
            "modules": {
                name: {"parameters": module.size, "bytes": module.nbytes}
                for name, module in self.modules(depth).items()
            },
            "tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype.name,
                    "bytes": tensor.nbytes,
                    "file": _file(tensor),
                }
                for name, tensor in self.tensors.items()
            },
            "provenance": self.provenance,
        }


def inspect(path: str | Path) -> Inspection:
    """Looks into a checkpoint: a folder of either kind, or a file of PyTorch's.

    Raises:
      ConversionError: for what is no checkpoint; ValueError: for damaged files of a native one.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    kind: Kind = "native" if checkpoint.is_native(path) else "PyTorch"
    if kind == "native":
        arrays, file = checkpoint.open_params(path).tensors, path / checkpoint.PARAMS
        tensors = {name: TensorInfo(array.shape, array.dtype, file) for name, array in arrays.items()}
    else:
        tensors = TorchFiles.open(path).tensors
    # A checkpoint that lacks something can be looked at.
    config = checkpoint.read_config(folder) if (folder / checkpoint.CONFIG).is_file() else {}
    return Inspection(path, kind, config, tensors, read_provenance(folder))


def _file(tensor: TensorInfo) -> str:
    return tensor.file.name if tensor.file else ""


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ by their headers.

    Attributes:
      a, b: the two.
      only_a, only_b: names that the other does not have.
      changed: name -> dtype and shape in either, where they differ.
      config: key -> {"a": value, "b": value}, without the side that does not have the key.
      contents: parameters whose hashes differ.
      hashed: how many parameters have a hash in both, and so were compared by content.
    """

    a: Inspection
    b: Inspection
    only_a: list[str]
    only_b: list[str]
    changed: dict[str, tuple[str, str]]
    config: dict[str, dict[str, Any]]
    contents: list[str]
    hashed: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs of what was compared; `hashed` says whether that was more than headers."""
        return not (self.only_a or self.only_b or self.changed or self.config or self.contents)

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "a": str(self.a.path),
            "b": str(self.b.path),
            "equal": self.equal,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "changed": {name: {"a": one, "b": other} for name, (one, other) in self.changed.items()},
            "config": self.config,
            "contents": self.contents,
            "hashed": self.hashed,
        }

    def report(self) -> str:
        """What differs, ten lines of each kind, and what was not compared."""
        kinds = {
            f"only in {self.a.path}": self.only_a,
            f"only in {self.b.path}": self.only_b,
            "different": [f"{name}: {one} -> {other}" for name, (one, other) in self.changed.items()],
            "config.json": [
                f"{key}: {' -> '.join(json.dumps(each[side]) if side in each else 'absent' for side in 'ab')}"
                for key, each in self.config.items()
            ],
            "other contents, by their hashes": self.contents,
        }
        lines = listed(kinds) if not self.equal else ["no difference in names, dtypes, shapes and config.json"]
        by_hashes = f"{self.hashed:,} parameters compared by the hashes in conversion.json"
        lines.append(by_hashes if self.hashed else "contents not compared: flax-vlm verify compares every value")
        return "\n".join(lines)


def compare(a: Inspection, b: Inspection) -> Comparison:
    """What differs between two checkpoints.

    Across kinds, parameters go by the tensors they were converted from, shapes (which are transposed, and fused or
    split) count as numbers of elements, and of the configs only keys that both have are compared: a conversion writes
    the defaults out.

    Raises:
      ConversionError: across kinds, where the native checkpoint does not say what its parameters were converted from.
    """
    left, right = _described(a, b)
    changed = {name: (left[name], right[name]) for name in left if name in right and left[name] != right[name]}
    hashed = [
        path
        for path in a.recorded
        if path in b.recorded and not changed.keys() & {path, a.recorded[path]["torch"], b.recorded[path]["torch"]}
    ]
    return Comparison(
        a,
        b,
        only_a=[name for name in left if name not in right],
        only_b=[name for name in right if name not in left],
        changed=changed,
        config=_config_differences(a.config, b.config, common_only=a.kind != b.kind),
        contents=[path for path in hashed if a.recorded[path]["sha256"] != b.recorded[path]["sha256"]],
        hashed=len(hashed),
    )


def listed(kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """Findings by kind as lines, the first of each."""
    lines = []
    for kind, found in kinds.items():
        if found:
            lines.append(f"{kind}: {len(found):,}")
            lines += [f"  {each}" for each in found[:SHOWN]]
            lines += [f"  and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else []
    return lines


def _described(a: Inspection, b: Inspection) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> dtype and shape of either; across kinds, PyTorch's name -> dtype and number of elements."""
    if a.kind == b.kind:
        left, right = ({n: f"{info.dtype.name} {info.shape}" for n, info in each.tensors.items()} for each in (a, b))
        return left, right
    native, torch = (a, b) if a.kind == "native" else (b, a)
    recorded = torch.recorded or native.recorded
    if not recorded:
        raise ConversionError(
            f"{native.path}: expected a conversion.json that says what its parameters are called in {torch.path}, came "
            "none. flax-vlm verify compares the two by value."
        )
    names = {path: each["torch"] for path, each in recorded.items()}
    ours, theirs = _by_torch_name(native, names), _by_torch_name(torch, {})
    return (ours, theirs) if a is native else (theirs, ours)


def _by_torch_name(inspection: Inspection, names: Mapping[str, str]) -> dict[str, str]:
    dtypes: dict[str, str] = {}
    sizes: Counter[str] = Counter()  # a tensor of PyTorch's may be several of ours
    for name, info in inspection.tensors.items():
        name = names.get(name, name)
        dtypes[name] = info.dtype.name
        sizes[name] += math.prod(info.shape)
    return {name: f"{dtype}, {sizes[name]:,} elements" for name, dtype in dtypes.items()}


def _config_differences(a: Mapping[str, Any], b: Mapping[str, Any], common_only: bool) -> dict[str, dict[str, Any]]:
    sides = {"a": dict(_flat(a)), "b": dict(_flat(b))}
    keys = [key for key in sides["a"] | sides["b"] if not common_only or all(key in side for side in sides.values())]
    values = {key: {name: side[key] for name, side in sides.items() if key in side} for key in keys}
    return {key: each for key, each in values.items() if len(each) < 2 or each["a"] != each["b"]}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of nested objects as "text_config.hidden_size"."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
