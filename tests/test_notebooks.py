"""The notebooks: what is stored is what their sources say, and these run from top to bottom."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext", reason="of the extra `notebooks`, which `make test-latest` has not")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_some() -> None:
    assert len(SOURCES) >= 6


def test_what_is_stored_was_made_by_its_source(source: Path) -> None:
    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(stored) == cells(jupytext.read(source)), f"`make notebooks` writes {source.stem}.ipynb anew"
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds and kinds & {"display_data", "execute_result"}


def test_it_opens_with_what_it_shows_and_needs(source: Path) -> None:
    opening = jupytext.read(source).cells[0].source
    assert opening.startswith("# ")
    assert re.search(r"\*\*Needs\*\* .*\b(minutes?|seconds)\b.*\bGB\b", opening, re.DOTALL)


@pytest.mark.slow
@pytest.mark.torch
def test_it_runs(source: Path, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "notebooks.py"
    subprocess.run([sys.executable, script, source, "--output", tmp_path], check=True, timeout=600)
    ran = nbformat.read((tmp_path / source.name).with_suffix(".ipynb"), as_version=4)
    assert cells(ran) == cells(jupytext.read(source))
