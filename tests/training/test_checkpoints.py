"""Checkpoints of a run."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.experimental import multihost_utils

from flax_vlm.training import checkpoints
from flax_vlm.training.checkpoints import Checkpoints


class State(struct.PyTreeNode):
    """What a state of training may hold."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    rng: jax.Array


def make_state(scale: float = 1.0) -> State:
    params = {"a": {"kernel": scale * jnp.arange(6.0).reshape(2, 3)}, "b": jnp.full(5, scale, jnp.bfloat16)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    return State(jnp.array(4), params, optimizer.init(params), None, jax.random.key(7, impl="rbg"))


def shapes(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def plain(tree: Any) -> list[tuple[Any, Any]]:
    """Leaves with their dtypes, keys as numbers."""
    leaves = jax.tree.leaves(tree)
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    data = [jax.random.key_data(leaf) if key else leaf for leaf, key in zip(leaves, keys, strict=True)]
    return [(str(leaf.dtype), np.asarray(each).tolist()) for leaf, each in zip(leaves, data, strict=True)]


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    state = make_state()
    with Checkpoints(tmp_path / "c") as saved:
        assert saved.latest() is None
        saved.save(4, state, {"position": 9, "of": ["x", None]})
    with Checkpoints(tmp_path / "c") as found:
        assert found.latest() == 4
        restored, position = found.restore(4, shapes(make_state(0.0)))
    assert position == {"position": 9, "of": ["x", None]}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert plain(restored) == plain(state)
    np.testing.assert_array_equal(jax.random.normal(restored.rng, 3), jax.random.normal(state.rng, 3))


def test_the_newest_stay(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as saved:
        for step in (1, 5, 20):
            saved.save(step, {"a": jnp.full(3, float(step))}, step)
        saved.wait()
        assert saved.latest() == 20
        assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "5"]
        assert saved.restore(5, {"a": jax.ShapeDtypeStruct((3,), jnp.float32)})[1] == 5


def test_a_state_may_be_donated_while_it_is_written(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {"a": jnp.zeros(1 << 20), "b": jnp.zeros(7)}
    with Checkpoints(tmp_path) as saved:
        saved.save(0, state, None)
        for _ in range(5):
            state = step(state)
        saved.wait()
        restored, _ = saved.restore(0, shapes(state))
    assert [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(restored)] == [0, 0]
    assert float(state["a"][0]) == 5


@pytest.mark.parametrize("left", ["2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-1700000000000000"])
def test_what_is_half_written_is_never_chosen(tmp_path: Path, left: str) -> None:
    with Checkpoints(tmp_path) as saved:
        saved.save(1, {"a": jnp.ones(3)}, None)
        saved.save(2, {"a": jnp.ones(3)}, None)
    (tmp_path / "2").rename(tmp_path / left)
    (tmp_path / left / "state" / "_METADATA").write_text("{")
    with Checkpoints(tmp_path) as found:
        assert found.latest() == 1
        found.save(2, {"a": jnp.full(3, 2.0)}, None)
        found.wait()
        restored, _ = found.restore(2, {"a": jax.ShapeDtypeStruct((3,), jnp.float32)})
        assert restored["a"].tolist() == [2, 2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_only_the_loop_asks_whether_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False)
    with Checkpoints(tmp_path) as written:
        written.save(1, make_state(), {})
        written.wait()
    assert not asked


def test_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_of_all_processes", lambda text: [text, text])
    with Checkpoints(tmp_path) as saved:
        saved.save(3, {"a": jnp.ones(2)}, {"position": 5})
        saved.wait()
        restored, position = saved.restore(3, {"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
    assert restored["a"].tolist() == [1, 1]
    assert position is None


def test_another_state(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as saved:
        saved.save(3, {"a": jnp.ones(2)}, None)
        saved.wait()
        for name, size in (("a", 4), ("b", 2)):
            with pytest.raises(ValueError, match="3: expected the state of this run, came another"):
                saved.restore(3, {name: jax.ShapeDtypeStruct((size,), jnp.float32)})
