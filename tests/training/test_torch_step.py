"""Ten steps beside torch's AdamW, on the same tiny models: clipped, decayed, slower in the image tower, on a cosine."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import convert
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.layers.stack import stack_params
from flax_vlm.models.altclip import AltCLIPModel
from flax_vlm.models.glm4v import GLM4VForConditionalGeneration
from flax_vlm.models.idefics import IdeficsForVisionText2Text, trainable
from flax_vlm.training.objective import Objective, contrastive, next_token
from flax_vlm.training.optimizer import OptimizerConfig, make_optimizer
from flax_vlm.training.patterns import Patterns, exact
from flax_vlm.training.step import TrainState, make_step, merge, split
from tests.parity import altclip_cases, idefics_cases
from tests.tolerances import FLOAT64, FLOAT64_GRADIENT, assert_close

pytestmark = pytest.mark.torch

STEPS, RATE, SLOWER, DECAY = 10, 0.004, 0.25, 0.3
EPS = 1e-6  # Adam divides by it what rounding leaves of a gradient that is zero
Named = Callable[[Any], Mapping[str, Any]]


def torch_course(model: Any, loss: Callable[[], Any], tower: str, clip: float, named: Named) -> tuple[Any, Any, Any]:
    """(losses, norms of gradients, parameters by name before the first step, behind it and behind the last)."""
    import torch

    parameters = [each for each in model.named_parameters() if each[1].requires_grad]
    groups = [
        {
            "params": [
                each for name, each in parameters if (each.ndim > 1, name.startswith(tower)) == (decays, slower)
            ],
            "weight_decay": DECAY if decays else 0.0,
            "factor": SLOWER if slower else 1.0,
        }
        for decays in (False, True)
        for slower in (False, True)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), eps=EPS)
    losses, norms = [], []

    def kept() -> Any:
        return {name: np.array(each) for name, each in named(dict(model.named_parameters())).items()}

    course = [kept()]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * RATE * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        optimizer.zero_grad()
        value = loss()
        value.backward()
        norm = torch.sqrt(sum(each.grad.square().sum() for _, each in parameters if each.grad is not None))
        for _, each in parameters:
            if each.grad is not None and norm > clip:
                each.grad *= clip / norm
        optimizer.step()
        losses.append(float(value.detach()))
        norms.append(float(norm))
        course += [kept()] if step in (0, STEPS - 1) else []
    return losses, norms, course


def our_course(
    objective: Objective,
    params: Any,
    batch: Any,
    tower: str,
    clip: float,
    named: Named,
    trains: Patterns[bool] = (),
    **options: Any,
) -> tuple[Any, Any, Any]:
    """The same of ours."""
    learning, frozen = split(params, trains)
    config = OptimizerConfig(
        learning_rate=RATE,
        b2=0.98,
        eps=EPS,
        weight_decay=DECAY,
        clip_norm=clip,
        learning_rates=((f"{tower}/.*", SLOWER),)
        if any(path.startswith(tower) for path in flatten_params(learning))
        else (),
    )
    optimizer = make_optimizer(config, learning, STEPS)
    create = partial(TrainState.create, optimizer=optimizer, dtype=jnp.float64, param_dtype=jnp.float64)
    state = jax.jit(create)(learning, frozen, rng=jax.random.key(0))
    step = jax.jit(make_step(objective, optimizer, spike_factor=1e3, **options))
    metrics, course = [], [jax.tree.map(np.array, named(params))]  # copies: these arrays may be torch's own
    for i in range(STEPS):
        state, each = step(state, batch)
        metrics.append(each)
        course += [named(jax.device_get(merge(state.params, state.frozen)))] if i in (0, STEPS - 1) else []
    assert metrics[-1].skipped == 0
    return [each.loss for each in metrics], [each.gradient_norm for each in metrics], course


def compare(ours: tuple[Any, Any, Any], theirs: tuple[Any, Any, Any], unmoved: Collection[str] = ()) -> None:
    """The first step to all digits, and losses, norms and parameters on the way to the last."""
    (losses, norms, course), (their_losses, their_norms, their_course) = ours, theirs
    assert their_losses[-1] < 0.8 * their_losses[0]
    assert_close(losses, their_losses, FLOAT64, "losses")
    assert_close(norms, their_norms, FLOAT64_GRADIENT, "norms of gradients")
    assert course[0].keys() == their_course[0].keys()
    still = set()
    for name, start in their_course[0].items():
        moved, theirs_moved = course[1][name] - course[0][name], their_course[1][name] - start
        assert_close(moved, theirs_moved, FLOAT64_GRADIENT, f"first step of {name}", floor=RATE * SLOWER)
        assert_close(course[-1][name], their_course[-1][name], FLOAT64_GRADIENT, name)
        still |= set() if moved.any() else {name}
    assert still == set(unmoved)


def test_altclip(x64: None) -> None:
    """The towers over one pair at a time."""
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = replace(altclip_cases.WHOLE, text_config=replace(altclip_cases.TEXT, **without))
    theirs = altclip_cases.torch_model(config, "AltCLIPModel", "float64")
    params = altclip_cases.ported(config, theirs, AltCLIPModel)
    batch = altclip_cases.texts() | {"pixel_values": altclip_cases.images()}
    tensors = altclip_cases.to_torch(batch, "float64")
    model = AltCLIPModel(config, dtype=jnp.float64, param_dtype=jnp.float64)
    compare(
        our_course(
            contrastive(model, microbatches=3),
            params,
            altclip_cases.to_jax(batch, "float64"),
            "vision_model",
            1.0,
            lambda params: convert.state_dict(config, params, key_style="v5"),
        ),
        torch_course(
            theirs,
            lambda: theirs(**tensors, return_loss=True).loss,
            "vision_model",
            1.0,
            lambda named: {name: each.detach().numpy() for name, each in named.items()},
        ),
    )


def test_idefics(x64: None) -> None:
    """Frozen by its own flags, the layers scanned, the batch in two parts, the loss in chunks of the vocabulary."""
    config = replace(
        idefics_cases.TIED,
        freeze_text_layers=True,
        freeze_vision_layers=True,
        freeze_vision_module_exceptions=("LayerNorm",),
    )
    theirs = idefics_cases.torch_model(config, "float64")
    batch = idefics_cases.inputs(padding_side="left", config=config)
    tensors, labels = idefics_cases.to_torch(batch, "float64"), idefics_cases.labels(batch, config)
    model = IdeficsForVisionText2Text(
        config, dtype=jnp.float64, param_dtype=jnp.float64, scan_layers=True, remat="full"
    )
    params = stack_params(idefics_cases.ported(config, theirs))

    def loss() -> Any:
        import torch

        logits = theirs(**tensors).logits
        return idefics_cases.legacy_loss(logits, torch.tensor(labels), tensors["attention_mask"])

    compare(
        our_course(
            next_token(model, vocab_chunk=16),
            params,
            idefics_cases.to_jax(batch | {"labels": labels}, "float64"),
            "model/vision_model",
            1.0,
            lambda params: convert.state_dict(config, params),
            exact(trainable(config, params)),
            accumulate=2,
        ),
        torch_course(
            theirs,
            loss,
            "model.vision_model",
            1.0,
            lambda named: {name: each.detach().numpy() for name, each in named.items()},
        ),
        {name for name, each in theirs.named_parameters() if not each.requires_grad or each.grad is None},
    )


def test_glm4v(x64: None) -> None:
    """A picture's patches count for none of the tokens that weigh the two parts of the batch."""
    import torch

    from tests.parity import glm4v_cases
    from tests.parity.test_glm4v_whole import SHORT, to_jax, to_torch

    labels = np.where(np.random.default_rng(2).random(SHORT["input_ids"].shape) < 0.3, -100, SHORT["input_ids"])
    theirs = glm4v_cases.torch_whole("float64")
    config, params = glm4v_cases.ported(theirs)
    batch = to_jax(SHORT | {"labels": labels}, "float64")
    tensors = to_torch(SHORT, "float64") | {"labels": torch.tensor(labels)}
    model = GLM4VForConditionalGeneration(config, dtype=jnp.float64, param_dtype=jnp.float64)
    compare(
        our_course(next_token(model), params, batch, "transformer/vision", 1.0, flatten_params, accumulate=2),
        torch_course(
            theirs,
            lambda: theirs(**tensors).loss,
            "vision",
            1.0,
            lambda named: flatten_params(glm4v_cases.in_our_places(config, named)),
        ),
    )
