"""The loop: killed, stopped or left alone, a run ends alike."""

import random
import socket
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.training.checkpoints import Checkpoints
from flax_vlm.training.loop import train
from flax_vlm.training.metrics import Sample, count_flops, peak_flops
from tests.training.killed_training import EVERY, STEPS, Done, Numbers, Run, log_of, make_config, numbers, pieces


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, str]:
    """A run that nothing happens to, and its log."""
    output = tmp_path_factory.mktemp("undisturbed")
    done = Run(output).outcome()
    assert done is not None
    assert done.step == STEPS
    assert [line["step"] for line in log_of(output)] == list(range(1, STEPS + 1))
    return done, (output / "log.jsonl").read_text()


def assert_same(output: Path, done: Done, undisturbed: tuple[Done, str]) -> None:
    expected, log = undisturbed
    assert done.step == STEPS
    assert done.numbers.keys() == expected.numbers.keys()
    for path, number in expected.numbers.items():
        assert done.numbers[path].tobytes() == number.tobytes(), path
    assert (output / "log.jsonl").read_text() == log


def kill_often(output: Path, undisturbed: tuple[Done, str], seed: int, kills: int) -> None:
    chance = random.Random(seed)
    killed = 0
    for _ in range(kills):
        killed += Run(output, kill=chance.randint(1, undisturbed[0].moments // 2)).outcome() is None
    assert killed, "nothing was killed"
    done = Run(output).outcome()
    assert done is not None
    assert_same(output, done, undisturbed)


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path, undisturbed: tuple[Done, str]) -> None:
    kill_often(tmp_path / "run", undisturbed, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_kills_at_many_moments(tmp_path: Path, undisturbed: tuple[Done, str], seed: int) -> None:
    kill_often(tmp_path / "run", undisturbed, seed, kills=6)


def test_sigterm_lets_the_step_end_and_saves(tmp_path: Path, undisturbed: tuple[Done, str]) -> None:
    stopped = Run(tmp_path, stop=EVERY + 2).outcome()
    assert stopped is not None
    assert stopped.step == EVERY + 2
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, EVERY + 3))
    with Checkpoints(tmp_path / "checkpoints") as found:
        assert found.latest() == EVERY + 2
    done = Run(tmp_path).outcome()
    assert done is not None
    assert_same(tmp_path, done, undisturbed)


def test_it_goes_on_on_another_mesh(tmp_path: Path, undisturbed: tuple[Done, str]) -> None:
    assert Run(tmp_path, stop=5).outcome() is not None
    done = Run(tmp_path, devices=3).outcome()
    assert done is not None
    assert done.step == STEPS
    for path, number in undisturbed[0].numbers.items():
        np.testing.assert_allclose(done.numbers[path], number, rtol=1e-6, atol=1e-6, err_msg=path)


def start_two(output: Path, stop: int = 0) -> list[Done | None]:
    """Two processes with a device each; SIGTERM comes to the second."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    runs = [Run(output, devices=2, stop=stop * index, job=(port, 2, index)) for index in range(2)]
    return [run.outcome() for run in runs]


def test_two_processes_stop_after_one_step_and_go_on(tmp_path: Path, undisturbed: tuple[Done, str]) -> None:
    stopped = [done.step for done in start_two(tmp_path, stop=4) if done]
    assert len(stopped) == 2
    assert 4 <= stopped[0] == stopped[1] < STEPS
    with Checkpoints(tmp_path / "checkpoints") as found:
        assert found.latest() == stopped[0]
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match="was not written by 1 processes"):
        train(config, **pieces(config))
    first, second = start_two(tmp_path)
    assert first is not None
    assert second is not None
    assert first.step == second.step == STEPS
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, STEPS + 1))
    for path, number in undisturbed[0].numbers.items():
        np.testing.assert_allclose(first.numbers[path], number, rtol=1e-6, atol=1e-6, err_msg=path)


def test_a_run_at_its_end_does_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=3)
    state = numbers(train(config, **pieces(config)))
    again = train(config, **pieces(config) | {"batches": None})
    for path, number in numbers(again).items():
        np.testing.assert_array_equal(number, state[path])


def test_what_a_person_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, steps=5, profile=(2, 3), sample_every=2, log_every=2)
    shown: list[int] = []

    def sample(state: Any) -> list[Sample]:
        shown.append(int(state.step))
        return [Sample("a seven", [np.zeros((4, 5, 3), np.uint8)])]

    train(config, **pieces(config), sample=sample)
    assert shown == [2, 4]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("   ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "tokens/s   data wait" in lines[0]
    assert "MFU" not in lines[0]  # nobody knows the peak of a CPU
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    for word in (b"gradient_norm", b"tokens_per_second", b"sample/0/text_summary", b"sample/0/0", b"a seven"):
        assert word in events


def test_a_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Poisoned(Numbers):
        def __next__(self) -> dict[str, Any]:
            batch = super().__next__()
            return batch | {"y": batch["y"] * np.nan} if self.position == 2 else batch

    config = make_config(tmp_path, steps=3)
    train(config, **pieces(config) | {"batches": Poisoned()})
    log = log_of(tmp_path)
    assert [line["loss"] is None for line in log] == [False, True, False]
    assert [line["skipped"] for line in log] == [0, 1, 1]
    assert capsys.readouterr().out.endswith("1 skipped\n")


def test_a_fault_while_training_leaves_what_was_saved(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=9)

    class Broken(Numbers):
        def __next__(self) -> dict[str, Any]:
            if self.position == 7:
                raise ValueError("data.max_bad")
            return super().__next__()

    with pytest.raises(ValueError, match="max_bad"):
        train(config, **pieces(config) | {"batches": Broken()})
    assert log_of(tmp_path)[-1]["step"] == 7
    with Checkpoints(tmp_path / "checkpoints") as found:
        assert found.latest() == 6


def test_flops_are_those_of_matrix_products() -> None:
    """B 2   D 3   F 5   layers 4"""
    x, kernels = jnp.ones((2, 3)), jnp.ones((4, 3, 5))

    def body(carry: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(carry @ kernel @ jnp.ones((5, 3))), None

    def loss(kernels: jax.Array) -> jax.Array:
        return jax.lax.scan(body, x, kernels)[0].sum()

    layer = 2 * 2 * 3 * 5 * 2  # both of its products
    assert count_flops(jax.make_jaxpr(loss)(kernels)) == 4 * layer
    # Backward: both products for the states, one for the kernel.
    assert count_flops(jax.make_jaxpr(jax.grad(loss))(kernels)) == 4 * (layer + layer + layer // 2)

    def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    program = jax.make_jaxpr(jax.jit(convolve))(jnp.ones((7, 6, 4, 3)), jnp.ones((2, 2, 3, 5)))
    assert count_flops(program) == 2 * (7 * 3 * 2 * 5) * (2 * 2 * 3)
    branches = jax.make_jaxpr(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x.T @ x, lambda x: x, x))(x)
    assert count_flops(branches) == 2 * 2 * 2 * 3 * 2


def test_peaks() -> None:
    assert peak_flops("cpu") is None
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
