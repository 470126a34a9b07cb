"""Whatever is done to a checkpoint's files: they are refused by a sentence, or converted to exactly what they hold."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from flax_vlm import checkpoint, convert
from flax_vlm.convert.layouts import layout_for
from flax_vlm.convert.rules import Rule, match
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.models import registry

from .fuzz import damage, write_checkpoints

IN_TEST, IN_TEST_SLOW = 60, 2000
SECONDS = 20


class Hang(BaseException):
    """No Exception, so that nothing handles it."""


@contextmanager
def in_time(line: str) -> Iterator[None]:
    """Counts seconds one by one: those of a process that was stopped are not its own."""
    ticks = iter(range(SECONDS))

    def tick(*_: object) -> None:
        if next(ticks, None) is None:
            raise Hang(f"{line}: not done after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def assert_holds_the_same(source: Path, target: Path) -> None:
    """Every tensor of `source`, read by safetensors itself, against the parameters that the table makes of it."""
    data, arrays = checkpoint.read_config(target), checkpoint.open_params(target)
    assert registry.read_config(data) == registry.read_config(checkpoint.read_config(source))
    shards = [file for file in TorchFiles.open(source).files if file.suffix == ".safetensors"]
    state = {name: array for shard in shards for name, array in load_file(shard).items()}
    rows = layout_for(data["architectures"][0], state)
    compared = set()
    for name, array in state.items():
        row, held = match(rows, name) or pytest.fail(f"{name}: no row knows it, and yet it was converted")
        if isinstance(row, Rule):
            (path,) = row.paths(held)
            expected, actual = row.transform.to_flax(array), arrays.read(path)
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
            assert actual.tobytes() == expected.tobytes(), name
            compared.add(path)
    assert compared == arrays.tensors.keys()


SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(IN_TEST, IN_TEST + IN_TEST_SLOW)]


@pytest.mark.parametrize("seed", [*range(IN_TEST), *SLOW])
def test_a_damaged_checkpoint(
    seed: int, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a busy disk is no hang
    source = tmp_path / "source"
    shutil.copytree(checkpoints[seed % 2], source)
    line = damage(source, seed)
    print(line)  # shown where the test fails
    try:
        with in_time(line):
            convert.to_flax(source, tmp_path / "target")
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, convert.ConversionError) or isinstance(error, OSError), repr(error)
        assert "config.json" in str(error) or ".safetensors" in str(error), "it names no file"
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    else:
        assert_holds_the_same(source, tmp_path / "target")


def test_damage_is_repeatable_and_real(checkpoints: list[Path], tmp_path: Path) -> None:
    """Most of it: a splice of equal bytes, say, changes nothing."""
    changed = 0
    for seed in range(200):
        twins = []
        for name in ("one", "two"):
            shutil.copytree(checkpoints[seed % 2], tmp_path / name / "source")
            line = damage(tmp_path / name / "source", seed)
            files = (tmp_path / name / "source").iterdir()
            twins.append((line, {file.name: file.read_bytes() for file in files if file.is_file()}))
            shutil.rmtree(tmp_path / name)
        assert twins[0] == twins[1]
        changed += twins[0][1] != {file.name: file.read_bytes() for file in checkpoints[seed % 2].iterdir()}
    assert changed > 180
