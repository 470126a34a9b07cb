"""The site that `make docs` builds: each page is in a table of contents, each public module in the API, no warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.markdown import ROOT, blocks
from tests.test_project import PROJECT, module_of, source_files

DOCS = ROOT / "docs"
# Commands tell of themselves (--help), and the demo of the examples.
NOT_IN_THE_API = {"flax_vlm.cli", "flax_vlm.demo"}
INDEX = "index"


def pages() -> set[str]:
    """By their names under docs/, and those of the notebooks that the build copies there."""
    written = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    return written | {f"notebooks/{notebook.stem}" for notebook in (ROOT / "notebooks").glob("*.ipynb")}


def listed(page: Path) -> list[str]:
    """What the tables of contents of a page name."""
    found = [block.text for block in blocks(page.read_text("utf-8")) if block.language == "{toctree}"]
    names = [line for text in found for line in text.splitlines() if line and not line.startswith(":")]
    return [(page.parent / name).relative_to(DOCS).as_posix() for name in names]


def test_every_page_stands_in_one_table_of_contents() -> None:
    named = [name for page in DOCS.rglob("*.md") for name in listed(page)]
    assert sorted(named) == sorted(pages() - {INDEX})


def test_every_public_module_is_in_the_api() -> None:
    modules = {module_of(file) for file in source_files() if not file.stem.startswith("_")}
    public = {module for module in modules if ".".join(module.split(".")[:2]) not in NOT_IN_THE_API}
    text = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(public)


def test_the_extras_are_those_of_the_package() -> None:
    rows = [
        line for line in (DOCS / INDEX).with_suffix(".md").read_text("utf-8").splitlines() if line.startswith("| `")
    ]
    named = {extra for row in rows for extra in re.findall(r"`([a-z]+)`", row.split("|")[1])}
    assert named == set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.slow
def test_it_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="of the extra `docs`, which `make test-latest` has not")
    without = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers')); from sphinx.cmd.build import main"
    code = f"{without}; sys.exit(main(sys.argv[1:]))"  # None in sys.modules: these cannot be imported
    command = [sys.executable, "-c", code, "-W", "--keep-going", "-q", "-d", tmp_path / "doctrees", DOCS, tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert built.returncode == 0, built.stderr
    attend = re.sub(r"<[^>]+>", "", (tmp_path / "api" / "layers.html").read_text("utf-8"))
    assert "flax_vlm.layers.attention.attend(" in attend and "Float[Array," in attend
    assert "jaxtyping" not in attend and "_Sentinel" not in attend
    notebook = (tmp_path / "notebooks" / "02_altclip.html").read_text("utf-8")
    assert "<img" in notebook and "Zero-shot" in notebook
