"""Lists of (pattern, value) over the paths of parameters: what trains, how fast, what decays. The first match wins.

A pattern is a regular expression that has to match a whole path, as `layers.param_tree` writes it:

    (("text_model/.*/bias", False), ("text_model/.*", True))

The paths are those of the tree at hand. Layers that are stacked for a scan are one leaf, which no pattern can part:
`encoder/layers_3/mlp/fc1/kernel` is a part of `encoder/layers/mlp/fc1/kernel` (IDEFICS: of `model/blocks/layers/...`,
or `model/blocks/layers_0/...` where a block has several). A pattern for both says `(blocks/)?layers(_[0-9]+)?`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from flax_vlm.layers.param_tree import flatten_params

T = TypeVar("T")
Default = TypeVar("Default")
Patterns: TypeAlias = Sequence[tuple[str, T]]


def first_match(patterns: Patterns[T], paths: Iterable[str], default: Default) -> dict[str, T | Default]:
    """The value of every path: that of the first pattern that matches it, or `default`.

    Raises:
      ValueError: naming every pattern that is no regular expression, or that decides nothing.
    """
    values: dict[str, T | Default] = dict.fromkeys(paths, default)
    open_paths = set(values)
    faults = []
    for pattern, value in patterns:
        try:
            matched = set(filter(re.compile(pattern).fullmatch, values))
        except re.error as error:
            faults.append(f"{pattern!r} is no regular expression: {error}")
            continue
        won = matched & open_paths
        if not matched:
            faults.append(f"{pattern!r} matches none of the {len(values)} paths")
        elif not won:
            faults.append(f"{pattern!r} matches only what earlier patterns took: move it up or take it out")
        values |= dict.fromkeys(won, value)
        open_paths -= won
    if faults:
        some = ", ".join(list(values)[:: max(1, len(values) // 3)][:3])
        raise ValueError("; ".join(faults) + f". A pattern has to match a whole path, such as one of {some}")
    return values


def exact(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A tree with a value for each parameter as patterns: IDEFICS' own flags are `exact(trainable(config, params))`."""
    return [(re.escape(path), value) for path, value in flatten_params(tree).items()]
