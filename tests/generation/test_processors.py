"""The scores a step chooses by: transformers' logits processors, ties included; and that draws follow them."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_vlm.generation import GenerationConfig, generate
from flax_vlm.generation.processors import NO_TOKEN, History, choose, process, warp
from flax_vlm.generation.request import make_options
from tests.generation.tiny import TinyDecoder, prompts, random_params
from tests.tolerances import FLOAT32, assert_close

jit_warp = jax.jit(warp)


def sampling(**options: Any) -> Any:
    return make_options(GenerationConfig(do_sample=True, **options), limit=1, least=0, slots=16).sampling


def scores_with_ties() -> np.ndarray:
    random = np.random.default_rng(0)
    smooth = random.normal(size=(4, 50)) * 3
    tied = np.round(smooth)  # many equal ones, +0 and -0 among them
    tied[1] = 2.0
    tied[2, ::3] = -np.inf
    return np.concatenate([smooth, tied]).astype(np.float32)


@pytest.mark.torch
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 80])
def test_warped_as_in_transformers(top_k: int) -> None:
    import torch
    from transformers import generation as theirs

    scores = scores_with_ties()
    for temperature, top_p, min_p in itertools.product((1.0, 0.7, 1.9), (1.0, 0.9, 0.31, 0.0), (None, 0.05, 0.5, 1.0)):
        expected = torch.from_numpy(scores)
        warpers: list[Any] = [theirs.TemperatureLogitsWarper(temperature)]
        warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
        warpers += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
        warpers += [theirs.MinPLogitsWarper(min_p)] if min_p is not None else []
        for warper in warpers:
            expected = warper(None, expected)
        options = sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        out, reference = np.asarray(jit_warp(scores, options)), expected.numpy()
        np.testing.assert_array_equal(np.isfinite(out[:4]), np.isfinite(reference[:4]))
        # Which of equal scores are left by top-p depends on torch's sort, which is not stable; how many does not.
        out, reference = np.sort(out), np.sort(reference)
        finite = np.isfinite(out)
        np.testing.assert_array_equal(finite, np.isfinite(reference))
        assert_close(out[finite], reference[finite], FLOAT32)


def test_of_equal_scores_top_p_keeps_the_first() -> None:
    equal = np.zeros((1, 8), np.float32)
    for top_p, kept in ((0.5, 4), (0.51, 5), (1e-9, 1), (0.0, 1), (0.99, 8)):
        out = jit_warp(equal, sampling(top_k=0, top_p=top_p))
        assert np.flatnonzero(np.isfinite(out)).tolist() == list(range(kept))


def test_top_p_keeps_what_reaches_it() -> None:
    shares = np.array([[0.05, 0.4, 0.3, 0.2, 0.05]], np.float32)
    for top_p, kept in ((0.39, [1]), (0.41, [1, 2]), (0.71, [1, 2, 3]), (0.91, [0, 1, 2, 3]), (0.96, [0, 1, 2, 3, 4])):
        out = jit_warp(np.log(shares), sampling(top_k=0, top_p=top_p))
        assert np.flatnonzero(np.isfinite(out)).tolist() == kept


def test_bans_look_at_the_written_tokens_only() -> None:
    config = GenerationConfig(bad_words_ids=[[3], [1, 2], [5, 5, 4], [7, 7, 7, 7, 0]], eos_token_id=[6], pad_token_id=0)
    options = make_options(config, limit=9, least=2, slots=8)
    tokens = np.full((2, 8), NO_TOKEN)
    tokens[0, 2:5] = [5, 5, 1]
    tokens[1, 3:5] = [5, 5]
    tokens[1, 5:] = 1  # not written yet: the slot is 5
    history = History(jnp.asarray(tokens))
    out = process(jnp.zeros((2, 9)), history, options, step=jnp.int32(1), slot=jnp.int32(5))
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in np.asarray(out)] == [[2, 3, 6], [3, 4, 6]]
    out = process(jnp.zeros((2, 9)), history, options, step=jnp.int32(2), slot=jnp.int32(5))
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in np.asarray(out)] == [[2, 3], [3, 4]]
    out = process(jnp.zeros((2, 9)), history, options, step=jnp.int32(2), slot=jnp.int32(5), no_repeat_ngram_size=2)
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in np.asarray(out)] == [[2, 3], [3, 4, 5]]


def test_greedy_takes_the_first_of_equals() -> None:
    scores = jnp.asarray([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    assert choose(scores, None, jnp.int32(0)).tolist() == [1, 0]


def fits(counts: np.ndarray, shares: np.ndarray) -> bool:
    """Whether draws that fell so may have been by these shares; a chi-square test needs five expected of each."""
    expected = shares.astype(np.float64) / shares.sum(dtype=np.float64) * counts.sum()
    rare = expected < 5
    counts, expected = (np.append(array[~rare], array[rare].sum()) for array in (counts, expected))
    if not expected[-1]:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    return len(counts) == 1 or bool(stats.chisquare(counts, expected).pvalue > 1e-3)


def test_every_step_and_every_row_draws_anew() -> None:
    scores = jnp.zeros((8, 40))
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    drawn = np.array([choose(scores, keys, jnp.int32(step)) for step in range(8)])
    assert min(len(set(line)) for line in [*drawn, *drawn.T]) >= 5


def test_draws_follow_the_scores() -> None:
    scores = jnp.asarray(np.random.default_rng(1).normal(size=20) * 2, jnp.float32)
    draws = 20_000
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    counts = np.bincount(choose(jnp.tile(scores, (draws, 1)), keys, jnp.int32(3)), minlength=20)
    assert fits(counts, np.asarray(jax.nn.softmax(scores)))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 12, "top_p": 0.9}, {"top_k": 0, "min_p": 0.05}], ids=str)
def test_what_is_generated_follows_the_scores(options: dict[str, Any]) -> None:
    model = TinyDecoder()
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=1,
        temperature=5.0,
        num_return_sequences=4000,
        seed=5,
        output_scores=True,
        **options,
    )
    out = generate(model, random_params(model), prompts(6), config)
    assert out.scores is not None
    counts = np.bincount(out.sequences[:, -1], minlength=model.vocab)
    assert fits(counts, np.asarray(jax.nn.softmax(out.scores[0, 0])))
    assert len(set(out.sequences[:, -1])) >= 5
