"""What trains: `trainable` against transformers' `requires_grad`."""

from dataclasses import replace
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm import convert
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsModel, trainable
from tests.parity import idefics_cases as cases

SMALL = replace(
    cases.RESAMPLED,
    num_hidden_layers=2,
    cross_layer_interval=2,
    vision_config=replace(cases.VISION, num_hidden_layers=1),
)
TEXT = [(), ("LayerNorm",), ("Linear",), ("Embedding",)]
VISION = [(), ("LayerNorm", "Embedding"), ("Linear",), ("LayerNorm",)]


def marked(config: IdeficsConfig, model_class: Any, stacked: bool = False) -> dict[str, bool]:
    """`trainable` by torch's names."""
    abstract = nn.meta.unbox(abstract_params(model_class(config)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), abstract)
    params = stack_params(params) if stacked else params
    tree = jax.tree.map(np.logical_or, params, trainable(config, params))
    state = convert.state_dict(config, tree, model_class)
    assert all(mark.all() == mark.any() for mark in state.values())
    return {name: bool(mark.all()) for name, mark in state.items()}


@pytest.mark.torch
@pytest.mark.parametrize("text, vision, head, tied", list(product([False, True], repeat=4)))
def test_every_combination_of_flags(text: bool, vision: bool, head: bool, tied: bool) -> None:
    for text_exceptions, vision_exceptions in list(zip(TEXT, VISION, strict=True))[: 4 if text or vision else 1]:
        config = replace(
            SMALL,
            freeze_text_layers=text,
            freeze_vision_layers=vision,
            freeze_lm_head=head,
            tie_word_embeddings=tied,
            freeze_text_module_exceptions=text_exceptions,
            freeze_vision_module_exceptions=vision_exceptions,
        )
        theirs = cases.untouched_torch_model(config)
        expected = {name: each.requires_grad for name, each in theirs.named_parameters()}
        assert marked(config, IdeficsForVisionText2Text) == expected


@pytest.mark.torch
def test_the_model_without_a_head() -> None:
    config = replace(SMALL, freeze_text_layers=True, freeze_vision_layers=True)
    theirs = cases.untouched_torch_model(config, "IdeficsModel")
    expected = {name: each.requires_grad for name, each in theirs.named_parameters()}
    assert set(expected.values()) == {True, False}
    assert marked(config, IdeficsModel) == expected


def test_layers_stacked_for_a_scan_are_marked_alike() -> None:
    config = replace(SMALL, freeze_text_layers=True, freeze_text_module_exceptions=("Linear",))
    one, other = (marked(config, IdeficsForVisionText2Text, stacked) for stacked in (False, True))
    assert one == other and set(one.values()) == {True, False}
