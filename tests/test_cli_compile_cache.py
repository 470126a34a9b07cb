"""Compiled programs that outlive a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_vlm.cli import compile_cache
from flax_vlm.cli.compile_cache import VARIABLE, keep_compiled

ROOT = Path(__file__).parent.parent


def test_the_second_command_compiles_nothing_anew(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a digit")
    command = [Path(sys.executable).parent / "flax-vlm", "embed", tmp_path / "vectors.npy", "--overwrite"]
    command += ["--model", ROOT / "examples" / "altclip-digits" / "checkpoint", "--texts", tmp_path / "texts"]
    environment = os.environ | {VARIABLE: str(tmp_path / "kept"), "JAX_EXPLAIN_CACHE_MISSES": "true"}

    def missed() -> bool:
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return "PERSISTENT COMPILATION CACHE MISS" in done.stderr

    # What compiles in a moment is not kept, and missed again.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    assert missed() and list((tmp_path / "kept").glob("*/*-cache"))
    assert not missed()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    own = {"XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(compile_cache.os, "environ", own)
    return own


def test_where_programs_are_kept(environment: dict[str, str], tmp_path: Path) -> None:
    keep_compiled()
    assert Path(environment["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "flax_vlm" / "xla"
    assert Path(environment.pop("JAX_COMPILATION_CACHE_DIR")).is_dir()
    environment[VARIABLE] = str(tmp_path / "other")
    keep_compiled()
    assert Path(environment.pop("JAX_COMPILATION_CACHE_DIR")).parent == tmp_path / "other"


@pytest.mark.parametrize("given", [{VARIABLE: "off"}, {"JAX_COMPILATION_CACHE_DIR": "/chosen"}])
def test_who_wants_none_or_his_own_is_left_alone(environment: dict[str, str], given: dict[str, str]) -> None:
    environment |= given
    before = dict(environment)
    keep_compiled()
    assert environment == before


def test_a_home_that_cannot_be_written_is_no_fault(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment[VARIABLE] = str(tmp_path / "file" / "inside")
    keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
