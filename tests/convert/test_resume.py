"""Conversions killed at any moment: nothing half loads, and after the next call it is as if nothing had happened."""

import errno
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import flax_vlm
from flax_vlm import checkpoint, convert
from flax_vlm.array_files import system_errors
from flax_vlm.convert import native_writer, stream
from flax_vlm.convert.errors import ConversionError
from flax_vlm.convert.stream import Progress
from flax_vlm.convert.torch_files import TorchFiles
from flax_vlm.pretrained import VLM
from tests.convert.killed import Conversion, Done, contents, fsync
from tests.convert.test_port import assert_same, tensors, write_hf


class Case(NamedTuple):
    """A conversion, and what it writes when it is left alone."""

    function: str
    source: Path
    expected: Path
    whole: Done
    options: dict[str, Any]

    def start(self, target: Path, step: int = 0, **options: Any) -> Conversion:
        return Conversion(self.function, self.source, target, step, **self.options, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    base = tmp_path_factory.mktemp("cases")
    write_hf(base / "hf")
    made = {}
    for function, source, options in (("to_flax", "hf", {}), ("to_torch", "to_flax/whole", {"max_shard_size": "20KB"})):
        target = base / function / "whole"
        whole = Conversion(function, base / source, target, **options).outcome()
        assert isinstance(whole, Done)
        made[function] = Case(function, base / source, target, whole, options)
    return made


@pytest.fixture(params=["to_flax", "to_torch"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def assert_same_files(folder: Path, expected: Path) -> None:
    actual, wanted = contents(folder), contents(expected)
    assert actual.keys() == wanted.keys()
    assert [name for name in wanted if actual[name] != wanted[name]] == []


def beside(target: Path, end: str) -> Path:
    return target.with_name(f".{target.name}.{end}")


def noted(target: Path) -> set[str]:
    """What the journal says is done."""
    journal = beside(target, "journal")
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return {json.loads(line)[0] for line in lines}


def array_files(folder: Path, names: set[str]) -> dict[int, int]:
    """When each file of these arrays was written, wherever they are by now."""
    arrays = [header.parent for header in folder.rglob("zarr.json") if header.parent.name.replace(".", "/") in names]
    found = [file.stat() for array in arrays for file in array.rglob("*") if file.is_file()]
    return {status.st_ino: status.st_mtime_ns for status in found}


def weights(folder: Path) -> dict[str, np.ndarray] | None:
    """The tensors of what any reader takes for weights."""
    for reader in (checkpoint.open_params, TorchFiles.open):
        try:
            files = reader(folder)
        except ValueError:
            continue
        return {name: np.array(files.read(name)) for name in files.tensors}
    return None


def loads(folder: Path) -> bool:
    try:
        flax_vlm.from_pretrained(folder)
    except ValueError:
        return False
    return True


def assert_whole_or_nothing(draft: Path, case: Case) -> None:
    """A draft is no checkpoint; in the last moment before it gets its name, it is all of it."""
    if loads(draft):
        assert_same_files(draft, case.expected)
    if (found := weights(draft)) is not None:
        assert_same(found, weights(case.expected) or {})
    for shard in draft.glob("*.safetensors"):
        if weights(shard) is not None:
            assert shard.read_bytes() == (case.expected / shard.name).read_bytes()


def die_and_go_on(case: Case, folder: Path, kills: int, start: Callable[[Path], Conversion]) -> None:
    """Takes up conversions that `start` begins and something kills until `kills` were, and each to its end."""
    for attempt in itertools.count():
        if not kills:
            return
        target = folder / str(attempt)
        done: set[str] = set()
        kept: dict[int, int] = {}
        while (outcome := (start(target) if kills else case.start(target)).outcome()) is None:
            kills -= 1
            if target.exists():  # killed after it got its name
                break
            draft = beside(target, "partial")
            assert_whole_or_nothing(draft, case)
            assert done <= noted(target)
            done = noted(target)
            assert kept.items() <= array_files(draft, done).items()
            kept = array_files(draft, done)
        else:
            assert isinstance(outcome, Done), outcome
            assert done.isdisjoint(outcome.written)
            assert bool(outcome.moved.resumed) == bool(done)
            assert outcome.moved.sha256 == case.whole.moved.sha256
            assert kept.items() <= array_files(target, done).items()
            assert not list(folder.glob(f".{target.name}.*"))
        assert_same_files(target, case.expected)


def at_random_steps(case: Case) -> Callable[[Path], Conversion]:
    chance = random.Random(case.function)
    return lambda target: case.start(target, chance.randint(1, len(case.whole.steps)))


def at_random_times(case: Case) -> Callable[[Path], Conversion]:
    chance = random.Random(case.function)

    def start(target: Path) -> Conversion:
        conversion = case.start(target)
        while conversion.process.is_alive() and not beside(target, "journal").exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 1.5 * case.whole.moved.seconds))
        conversion.process.kill()
        return conversion

    return start


@pytest.mark.parametrize("moments", [at_random_steps, at_random_times])
def test_a_killed_conversion_goes_on(moments: Callable[..., Any], case: Case, tmp_path: Path) -> None:
    die_and_go_on(case, tmp_path, 4, moments(case))


@pytest.mark.slow
@pytest.mark.parametrize("moments", [at_random_steps, at_random_times])
def test_many_killed_conversions_go_on(moments: Callable[..., Any], case: Case, tmp_path: Path) -> None:
    die_and_go_on(case, tmp_path, 100, moments(case))


@pytest.mark.slow
def test_killed_while_orbax_takes_over(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["to_flax"]
    renames = [step for step, what in enumerate(case.whole.steps, 1) if what == "os.rename"]
    for step in (renames[0], renames[50], renames[-2], renames[-2] + 1):
        die_and_go_on(case, tmp_path / str(step), 1, lambda target, step=step: case.start(target, step))


@pytest.mark.slow
def test_a_kill_while_one_checkpoint_replaces_another(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["to_torch"]
    old = tmp_path / "old"
    assert isinstance(Conversion("to_torch", case.source, old, dtype="bfloat16").outcome(), Done)
    shutil.copytree(old, tmp_path / "trial" / "target")
    whole = case.start(tmp_path / "trial" / "target", overwrite=True).outcome()
    assert isinstance(whole, Done)
    last_weights = max(step for step, what in enumerate(whole.steps, 1) if what == "pwrite")
    seen = set()
    for step in range(last_weights, len(whole.steps) + 1):
        target = tmp_path / str(step) / "target"
        shutil.copytree(old, target)
        assert case.start(target, step, overwrite=True).outcome() is None
        if target.exists():
            seen.add("old" if contents(target) == contents(old) else "new")
            assert_same_files(target, old if contents(target) == contents(old) else case.expected)
        else:  # a call that does not replace it puts it back
            seen.add("neither")
            shutil.copytree(target.parent, tmp_path / "put back")
            assert isinstance(case.start(tmp_path / "put back" / "target").outcome(), FileExistsError)
            assert_same_files(tmp_path / "put back" / "target", old)
        again = case.start(target, overwrite=True).outcome()
        assert isinstance(again, Done), again
        assert_same_files(target, case.expected)
        assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert seen == {"old", "neither", "new"}


@pytest.fixture
def eager_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note in the journal for every tensor, without waiting for the disk."""
    monkeypatch.setattr(stream, "GROUP", 1)
    monkeypatch.setattr(os, "fsync", fsync)


def interrupted(function: Any, source: Path, target: Path, **options: Any) -> None:
    """A conversion that somebody stops half way."""

    def stop(at: Progress) -> None:
        if at.done > at.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function(source, target, progress=stop, **options)
    assert not target.exists()


@pytest.fixture
def folders(tmp_path: Path) -> dict[Any, Path]:
    """Where each conversion reads."""
    write_hf(tmp_path / "hf")
    convert.to_flax(tmp_path / "hf", tmp_path / "native")
    return {convert.to_flax: tmp_path / "hf", convert.to_torch: tmp_path / "native"}


def test_an_interrupted_conversion_goes_on(folders: dict[Any, Path], tmp_path: Path, eager_notes: None) -> None:
    for function, source in folders.items():
        target = tmp_path / function.__name__
        interrupted(function, source, target)
        reports: list[Progress] = []
        moved = function(source, target, progress=reports.append)
        assert 0 < moved.resumed < moved.nbytes
        assert reports[0].resumed == moved.resumed and reports[-1].done == reports[-1].total == moved.nbytes


def test_what_somebody_took_out_of_a_draft_is_written_again(
    folders: dict[Any, Path], tmp_path: Path, eager_notes: None
) -> None:
    cases = ((convert.to_flax, "arrays/*", {}), (convert.to_torch, "*.safetensors", {"max_shard_size": "20KB"}))
    for function, pieces, options in cases:
        target = tmp_path / function.__name__
        interrupted(function, folders[function], target, **options)
        piece = sorted(beside(target, "partial").glob(pieces))[0]
        shutil.rmtree(piece) if piece.is_dir() else piece.unlink()
        assert function(folders[function], target, **options).resumed
        function(folders[function], tmp_path / "fresh", overwrite=True, **options)
        assert contents(target) == contents(tmp_path / "fresh")


def other_weights(source: Path) -> None:
    """The same files, of the same sizes, other weights."""
    before = {file.name: file.stat().st_size for file in source.iterdir() if file.is_file()}
    original = source.with_name("original")
    source.rename(original)
    if checkpoint.is_native(original):
        vlm = flax_vlm.from_pretrained(original)
        VLM(vlm.model, jax.tree.map(lambda leaf: leaf + 1, vlm.params)).save_pretrained(source)
    else:
        shutil.copytree(original, source)
        state = {name: np.asarray(array + 1) for name, array in tensors(original).items()}
        save_file(state, source / "model.safetensors")
        assert before == {file.name: file.stat().st_size for file in source.iterdir()}


def other_config(source: Path) -> None:
    data = checkpoint.read_config(source)
    (source / "config.json").write_text(json.dumps(data | {"initializer_factor": 2.0, "added": "later"}))


CHANGES = [
    (convert.to_flax, other_weights, {}),
    (convert.to_flax, other_config, {}),
    (convert.to_flax, None, {"dtype": "bfloat16"}),
    (convert.to_flax, None, {"model_class": flax_vlm.AltCLIPVisionModel}),
    (convert.to_torch, other_weights, {}),
    (convert.to_torch, other_config, {}),
    (convert.to_torch, None, {"dtype": "bfloat16"}),
    (convert.to_torch, None, {"key_style": "v5"}),
    (convert.to_torch, None, {"max_shard_size": "20KB"}),
]


@pytest.mark.parametrize("function, change, options", CHANGES)
def test_another_conversion_starts_afresh(
    function: Any, change: Any, options: Any, folders: dict[Any, Path], tmp_path: Path, eager_notes: None
) -> None:
    source = folders[function]
    interrupted(function, source, tmp_path / "target")
    if change:
        change(source)
    moved = function(source, tmp_path / "target", **options)
    assert not moved.resumed
    function(source, tmp_path / "fresh", **options)
    assert contents(tmp_path / "target") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("function", [convert.to_flax, convert.to_torch])
def test_source_and_target_lie_apart(function: Any, folders: dict[Any, Path], tmp_path: Path) -> None:
    source = folders[function]
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for target in (source, source / "below", source / "a" / ".." / "b", tmp_path, tmp_path / "link" / "below"):
        with pytest.raises(ConversionError, match=r"expected a folder apart from .* Choose another target"):
            function(source, target, overwrite=True)
    assert contents(source) == before


@pytest.mark.parametrize("function", [convert.to_flax, convert.to_torch])
def test_a_disk_without_room(
    function: Any, folders: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = sum(array.nbytes for array in tensors(folders[convert.to_flax]).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, nbytes - 1))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        OSError, match=f"the disk is full: at least {nbytes:,} bytes are needed, {nbytes - 1:,} are free"
    ) as caught:
        function(folders[function], tmp_path / "target")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(tmp_path.iterdir()) == before


FULL = (  # what tensorstore says on a full disk
    'RESOURCE_EXHAUSTED: Error writing local file "a/c/0/0": Failed writing: "a/c/0/0.__lock": Failed to write 3616 '
    "bytes to file 4: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize("function", [convert.to_flax, convert.to_torch])
def test_a_disk_that_fills_up(
    function: Any, folders: dict[Any, Path], tmp_path: Path, eager_notes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the tensors are written, then no more."""
    calls = itertools.count()
    settle, pwrite = native_writer._settle, os.pwrite

    def full(*arguments: Any) -> Any:
        if next(calls) < 40:
            return (settle if function is convert.to_flax else pwrite)(*arguments)
        if function is convert.to_torch:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with system_errors(arguments[1]):
            raise ValueError(FULL)

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(native_writer, "_settle", full)
        patch.setattr(os, "pwrite", full)
        function(folders[function], tmp_path / "target")
    assert caught.value.errno == errno.ENOSPC
    assert "target: the disk is full: at least 107,732 bytes are needed" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "target").exists()
    assert function(folders[function], tmp_path / "target").resumed > 0
    function(folders[function], tmp_path / "fresh")
    assert contents(tmp_path / "target") == contents(tmp_path / "fresh")
