"""Parameters as a flat table: {"encoder/layers_0/mlp/fc1/kernel": leaf}."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict


def flatten_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries to path -> leaf, paths joined by "/"."""
    return dict(flatten_dict(params, sep="/"))


def unflatten_params(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_params`."""
    return unflatten_dict(dict(leaves), sep="/")
