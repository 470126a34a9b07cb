"""How few bits a weight can have: the command runs, and its four bits are the nearest ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bits


@pytest.mark.parametrize("group", [4, 7, 16])
def test_the_nearest_of_sixteen_values(group: int) -> None:
    kernel = np.random.default_rng(0).normal(size=(14, 3)).astype(np.float32)
    kernel[:, 1] = 0
    kernel[:, 2] = np.abs(kernel[:, 2]) + 1
    found = np.asarray(bits.in_four_bits(jnp.asarray(kernel), group))
    assert found.shape == kernel.shape and not found[:, 1].any()
    for start in range(0, 14, group):
        before, after = kernel[start : start + group], found[start : start + group]
        step = (np.maximum(before.max(0), 0) - np.minimum(before.min(0), 0)) / 15
        # Half a step, and at the ends as much again: zero is one of the values, so that they move by half a step.
        assert (np.abs(after - before) <= step * 1.001 + 1e-7).all()
        assert np.median(np.abs(after - before)[:, [0, 2]] / step[[0, 2]]) <= 0.5
        assert all(len(np.unique(column)) <= 16 for column in after.T)


@pytest.mark.slow
def test_one_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert bits.main(["--every", "60"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        [weights, model]
        for model in ("IDEFICS", "GLM-4V")
        for weights in ("float32", "int8, a scale an output", *(f"int4, groups of {group}" for group in bits.GROUPS))
    ]
    same = {(model, weights): float(share.split("%")[0]) for weights, model, _, share in rows}
    for model in ("IDEFICS", "GLM-4V"):
        assert same[model, "int8, a scale an output"] > same[model, "int4, groups of 32"] > 80
