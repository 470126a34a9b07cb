"""Patterns over paths: the first match wins, and none may be without effect."""

import numpy as np
import pytest

from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.training.patterns import exact, first_match

PATHS = ["text/layers_0/kernel", "text/layers_0/bias", "vision/layers_0/kernel", "scale"]


def test_the_first_match_wins_and_the_rest_is_the_default() -> None:
    patterns = [(".*/bias", 1), ("text/.*", 2), (".*vision.*", 3)]
    assert first_match(patterns, PATHS, None) == dict(zip(PATHS, [2, 1, 3, None], strict=True))
    assert first_match((), PATHS, 7) == dict.fromkeys(PATHS, 7)


def test_a_pattern_matches_whole_paths_only() -> None:
    with pytest.raises(
        ValueError,
        match=r"'text' matches none of the 4 paths; 'vision/layers' matches none .* one of text/layers_0/kernel",
    ):
        first_match([("text", 1), ("vision/layers", 2), ("scale", 3)], PATHS, 0)


@pytest.mark.parametrize(
    "patterns, message",
    [
        ([(".*", 1), ("text/.*", 2)], "'text/.*' matches only what earlier patterns took: move it up"),
        ([("text/(", 1)], r"'text/\(' is no regular expression: missing \)"),
    ],
)
def test_patterns_without_effect(patterns: list[tuple[str, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_match(patterns, PATHS, 0)


def test_a_tree_of_values_as_patterns() -> None:
    tree = {"a": {"layers_0": {"kernel": True, "kernels": False}}, "a.layers_0": {"kernel": False}}
    assert first_match(exact(tree), flatten_params(tree), np.nan) == flatten_params(tree)
