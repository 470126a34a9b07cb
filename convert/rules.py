"""Tables that say where each tensor of a PyTorch checkpoint lives in our parameters, readable in both directions.

    LAYERS = (
        Rule("layers.{i}.self_attn.{p:q|k|v|o}_proj.weight", "layers_{i}/self_attn/{p}_proj/kernel", linear),
        Rule("layers.{i}.mlp.gate_up.weight", ("layers_{i}/mlp/gate/kernel", "layers_{i}/mlp/up/kernel"), linear),
        Drop("layers.{i}.self_attn.rotary_emb.inv_freq", "a buffer of releases up to 4.32; recomputed in float32"),
    )
    RULES = (Rule("lm_head.weight", "lm_head/kernel", linear), *under("model.", "model/", LAYERS))

A template stands for whole names. All of it is literal, except
    {i}               an integer
    {p:q|k|v|o}       one of some words; our side repeats it as {p}
    [layer|layers]    spellings of one name, on torch's side only: what transformers 4.x writes, what 5.x writes, then
                      any that are only read; one that did not change is repeated, as in [weight|weight|gamma]
    {*}               anything, in a Drop only
What the holes held carries over by their names, which is all it takes to go back. Presence is not written down: every
tensor of a file must match exactly one row, and every parameter of the model must be filled by exactly one tensor.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Literal, Protocol

import numpy as np

from .errors import ConversionError, Faults
from .torch_files import Index, Shaped, TensorInfo

KEY_STYLES = ("v4", "v5")  # the first and the second spelling of a bracket
KeyStyle = Literal["v4", "v5"]


@dataclass(frozen=True)
class Axes:
    """How torch's axes become ours: "o i -> i o". A 1 on torch's side is an axis of length one that ours goes without.

    Shapes, indices and arrays are permuted alike, the arrays as views. "..." is any number of axes left as they are.
    """

    pattern: str

    def __post_init__(self) -> None:
        torch, flax = (side.split() for side in self.pattern.split("->"))
        if sorted(axis for axis in torch if axis != "1") != sorted(set(flax)) or len(set(flax)) != len(flax):
            raise ValueError(f"{self.pattern!r}: expected each axis once on either side, and 1 on the left side only")

    def flax_shape(self, torch_shape: tuple[int, ...]) -> tuple[int, ...]:
        ours = self._ours(len(torch_shape) - self._units)
        if any(size != 1 for size, axis in zip(torch_shape, ours, strict=True) if axis is None):
            raise ValueError(f"{self.pattern!r} expects 1 where a tensor of shape {torch_shape} has more")
        return tuple(torch_shape[ours.index(axis)] for axis in range(len(torch_shape) - self._units))

    def torch_shape(self, flax_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(1 if axis is None else flax_shape[axis] for axis in self._ours(len(flax_shape)))

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        order = [axis for axis in self._ours(array.ndim - self._units) if axis is not None]
        shape = self.flax_shape(array.shape)
        squeezed = array.reshape([shape[axis] for axis in order])
        return squeezed.transpose([order.index(axis) for axis in range(len(order))])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        order = [axis for axis in self._ours(array.ndim) if axis is not None]
        return array.transpose(order).reshape(self.torch_shape(array.shape))

    def torch_index(self, flax_index: Index) -> Index:
        """Where a slice of ours lies in the tensor: to_flax(tensor[torch_index(ix)]) equals to_flax(tensor)[ix]."""
        return tuple(slice(None) if axis is None else flax_index[axis] for axis in self._ours(len(flax_index)))

    def slowest_axis(self, ndim: int) -> int | None:
        """Which of our `ndim` axes torch's rows run along; None for a scalar."""
        return next((axis for axis in self._ours(ndim) if axis is not None), None)

    @property
    def _units(self) -> int:
        return self.pattern.split().count("1")

    def _ours(self, ndim: int) -> tuple[int | None, ...]:
        """For each torch axis, which of our `ndim` axes it is; None for an axis of length one."""
        return _ours(self.pattern, ndim)


@lru_cache
def _ours(pattern: str, ndim: int) -> tuple[int | None, ...]:
    torch, flax = (side.split() for side in pattern.split("->"))
    if flax == ["..."]:
        return tuple(range(ndim))
    if len(flax) != ndim:
        raise ValueError(f"{pattern!r} gives {len(flax)} axes, {ndim} were expected; change the row or the parameter")
    return tuple(None if axis == "1" else flax.index(axis) for axis in torch)


identity = Axes("... -> ...")
linear = Axes("o i -> i o")  # torch.nn.Linear keeps (out, in)
conv = Axes("o i h w -> h w i o")  # torch.nn.Conv2d


@dataclass(frozen=True)
class Rule:
    """One or more of our parameters, and the tensor that holds them, concatenated along its first axis if several.

    How many rows each part has follows from the shapes of the parameters.
    """

    torch: str
    flax: str | tuple[str, ...]
    transform: Axes = identity

    def __post_init__(self) -> None:
        holes = _holes(self.torch)
        for part in self.parts:
            there = _holes(part)
            if "[" in part or "*" in holes or there.keys() != holes.keys():
                raise ValueError(f"{self.torch!r} <-> {part!r}: expected the same holes, and spellings on the left")
            if any(choices not in ("", holes[name]) for name, choices in there.items()):
                raise ValueError(f"{self.torch!r} <-> {part!r}: expected the same words on both sides")

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.flax,) if isinstance(self.flax, str) else self.flax

    def paths(self, held: Mapping[str, str]) -> tuple[str, ...]:
        """The parameters meant by what the holes of a name held."""
        return tuple(_fill(part, held) for part in self.parts)

    @cached_property
    def torch_regex(self) -> re.Pattern[str]:
        return _regex(self.torch, _holes(self.torch))

    @cached_property
    def part_regexes(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_regex(part, _holes(self.torch)) for part in self.parts)


@dataclass(frozen=True)
class Tied(Rule):
    """A tensor that repeats a parameter filled by another one: may be absent, must be equal, is never written."""


@dataclass(frozen=True)
class Drop:
    """A tensor of the file that is no parameter of ours, and why."""

    torch: str
    reason: str

    def __post_init__(self) -> None:
        _holes(self.torch)

    @cached_property
    def torch_regex(self) -> re.Pattern[str]:
        return _regex(self.torch, _holes(self.torch))


Row = Rule | Drop


def under(torch_prefix: str, flax_prefix: str, rows: Sequence[Row]) -> tuple[Row, ...]:
    """A table inside a larger model: under("text_model.", "text_model/", ROBERTA). Prefixes are templates too."""

    def moved(row: Row) -> Row:
        torch = torch_prefix + row.torch
        if isinstance(row, Drop):
            return replace(row, torch=torch)
        return replace(row, torch=torch, flax=tuple(flax_prefix + part for part in row.parts))

    return tuple(map(moved, rows))


def match(rows: Sequence[Row], name: str) -> tuple[Row, dict[str, str]] | None:
    """The row of a tensor's name, and what its holes hold; None if no row knows it."""
    found = [(row, held.groupdict()) for row in rows if (held := row.torch_regex.fullmatch(name))]
    if len(found) > 1:
        clash = " and ".join(repr(row.torch) for row, _ in found)
        raise ValueError(f"{name}: one row was expected to match, {clash} do; make them exclude each other")
    return found[0] if found else None


class Reader(Protocol):
    """TorchFiles, or InMemory."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """Where one of our parameters is read: a whole tensor, or `rows` of a fused one."""

    flax: str
    shape: tuple[int, ...]  # ours
    torch: str
    info: TensorInfo  # of the whole tensor
    rows: slice | None
    transform: Axes
    tied: tuple["Source", ...] = ()

    def read(self, files: Reader, index: Index | None = None) -> np.ndarray:
        """The parameter, or the slice of it that jax.make_array_from_callback asks for, reading no more than that."""
        array = self.transform.to_flax(files.read(self.torch, self._torch_index(index)))
        for twin in self.tied:
            if not np.array_equal(array, twin.read(files, index), equal_nan=True):
                raise ConversionError(
                    f"{twin.torch} was expected to equal {self.torch}, because config.json ties them, and differs. "
                    "Set tie_word_embeddings to false in config.json if both were trained."
                )
        return array

    def _torch_index(self, index: Index | None) -> Index | None:
        if self.rows is None:
            return None if index is None else self.transform.torch_index(index)
        first, *rest = self.transform.torch_index(index or (slice(None),) * len(self.shape))
        start, stop, _ = first.indices(self.rows.stop - self.rows.start)
        return (slice(self.rows.start + start, self.rows.start + stop), *rest)


@dataclass(frozen=True)
class Target:
    """What one tensor is written from: one parameter, or the parts of a fused one in order."""

    torch: str
    shape: tuple[int, ...]  # torch's
    flax: tuple[str, ...]
    transform: Axes

    def build(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        parts = [self.transform.to_torch(read(path)) for path in self.flax]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


UNKNOWN = "tensors that no rule of this model knows; is this the checkpoint of another model, or an adapter?"
ABSENT = "tensors whose parameter this model does not have; has config.json fewer layers, or other options?"
UNFILLED = "parameters that no tensor fills; is the checkpoint whole, and config.json its own?"
DOUBLED = "parameters that several tensors fill; keep one of them"
MISSHAPEN = "tensors of another shape than the model's; is this config.json from another model?"
INTEGERS = "integer tensors where floating-point ones were expected; convert the checkpoint before it was quantised"


def plan_read(rows: Sequence[Row], files: Mapping[str, TensorInfo], params: Mapping[str, Shaped]) -> list[Source]:
    """Where each of `params` (path -> anything with shape and dtype) is read, in the order of the files.

    Raises one ConversionError of everything that does not fit.
    """
    faults = Faults()
    sources: dict[str, list[Source]] = {}
    tied: dict[str, list[Source]] = {}
    for name, info in files.items():
        where = f"{info.file.name}: {name}" if info.file else name
        found = match(rows, name)
        if found is None:
            faults.add(UNKNOWN, f"{where} {info.shape}")
            continue
        row, held = found
        if isinstance(row, Drop):
            continue
        paths = row.paths(held)
        if absent := [path for path in paths if path not in params]:
            faults.add(ABSENT, f"{where} {info.shape}, for {', '.join(absent)}")
            continue
        expected, spans = _fused(row, paths, params)
        if info.shape != expected:
            faults.add(MISSHAPEN, f"{where} has shape {info.shape}; {expected} was expected")
        # By kind, because numpy does not count bfloat16 (kind "V") among its floats.
        if info.dtype.kind in "iub" and all(np.dtype(params[path].dtype).kind not in "iub" for path in paths):
            faults.add(INTEGERS, f"{where} is {info.dtype}")
        for path, span in zip(paths, spans, strict=True):
            source = Source(path, tuple(params[path].shape), name, info, span, row.transform)
            (tied if isinstance(row, Tied) else sources).setdefault(path, []).append(source)

    for path, several in sources.items():
        if len(several) > 1:
            faults.add(DOUBLED, f"{path}: {', '.join(source.torch for source in several)}")
    for path in params:
        if path not in sources and path not in tied:
            faults.add(UNFILLED, f"{path} {tuple(params[path].shape)}")
    faults.raise_any("The checkpoint does not fit the model that config.json describes.")

    # A twin stands in where the tensor that it repeats was left out of the file.
    every = {path: sources.get(path, []) + tied.get(path, []) for path in sources | tied}
    return [replace(first, tied=tuple(twins)) for first, *twins in every.values()]


def plan_write(rows: Sequence[Row], params: Mapping[str, Shaped], key_style: KeyStyle = "v4") -> list[Target]:
    """The tensors that hold each of `params` exactly once, in the order of `params`."""
    if key_style not in KEY_STYLES:
        raise ConversionError(f"key_style is one of {', '.join(KEY_STYLES)}, came {key_style!r}")
    rules = [row for row in rows if isinstance(row, Rule) and not isinstance(row, Tied)]
    parts = [(regex, rule) for rule in rules for regex in rule.part_regexes]
    faults = Faults()
    tensors: dict[str, tuple[Rule, dict[str, str]]] = {}
    for path in params:
        found = [(rule, held.groupdict()) for regex, rule in parts if (held := regex.fullmatch(path))]
        if not found:
            faults.add("parameters that no rule of this model knows; add a row for them", path)
            continue
        name = _fill(found[0][0].torch, found[0][1], KEY_STYLES.index(key_style))
        if len(found) > 1 or tensors.setdefault(name, found[0]) != found[0]:
            raise ValueError(f"{path}, {name}: one row was expected to match, several do; make them exclude each other")

    targets = []
    for name, (rule, held) in tensors.items():
        paths = rule.paths(held)
        if missing := [path for path in paths if path not in params]:
            faults.add("fused tensors of which parts are missing; give all of them", f"{name}: {', '.join(missing)}")
            continue
        targets.append(Target(name, _fused(rule, paths, params)[0], paths, rule.transform))
    faults.raise_any("The parameters do not fit the table of their model.")
    return targets


def _fused(
    rule: Rule, paths: Sequence[str], params: Mapping[str, Shaped]
) -> tuple[tuple[int, ...], Sequence[slice | None]]:
    """The shape of a row's tensor, and the rows of each part in it; None where the one part is all of it."""
    try:
        shapes = [rule.transform.torch_shape(tuple(params[path].shape)) for path in paths]
    except ValueError as error:
        raise ValueError(f"{rule.torch!r} <-> {rule.flax!r}: {error}") from error
    if len(shapes) == 1:
        return shapes[0], [None]
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"{rule.torch!r}: parts of one width were expected, came {shapes}")
    stops = list(accumulate(shape[0] for shape in shapes))
    return (stops[-1], *shapes[0][1:]), [slice(start, stop) for start, stop in pairwise([0, *stops])]


_TOKEN = re.compile(
    r"\{(?P<hole>[a-z]\w*|\*)(?::(?P<words>[^{}\[\]:]+))?\}"  # {i}, {p:q|k}, {*}
    r"|\[(?P<spellings>[^{}\[\]]*\|[^{}\[\]]*)\]"  # [layer|layers]
)


def _holes(template: str) -> dict[str, str]:
    """The holes of a template by name, each with its words, or "" for an integer."""
    if re.search(r"[{}\[\]|]", _TOKEN.sub("", template)):
        raise ValueError(f"{template!r}: expected {{i}}, {{p:q|k}} or [a|b], came a bracket or a bar of its own")
    found = [(token["hole"], token["words"] or "") for token in _TOKEN.finditer(template) if token["hole"]]
    if len(dict(found)) < len(found):
        raise ValueError(f"{template!r}: expected each hole once; give the second one another name")
    return dict(found)


def _regex(template: str, holes: Mapping[str, str]) -> re.Pattern[str]:
    regex, end = "", 0
    for token in _TOKEN.finditer(template):
        regex += re.escape(template[end : token.start()])
        end = token.end()
        if token["hole"] == "*":
            regex += ".+"
        elif token["hole"]:
            words = holes[token["hole"]]
            regex += f"(?P<{token['hole']}>{_any_of(words) if words else '[0-9]+'})"
        else:
            regex += f"(?:{_any_of(token['spellings'])})"
    return re.compile(regex + re.escape(template[end:]))


def _any_of(words: str) -> str:
    return "|".join(map(re.escape, words.split("|")))


def _fill(template: str, held: Mapping[str, str], spelling: int = 0) -> str:
    """The name that a template stands for."""

    def text(token: re.Match[str]) -> str:
        return held[token["hole"]] if token["hole"] else token["spellings"].split("|")[spelling]

    return _TOKEN.sub(text, template)
