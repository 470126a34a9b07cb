"""Executes notebooks and writes them, with what they show, beside their sources: `make notebooks`.

    python scripts/notebooks.py                       # all of notebooks/*.py
    python scripts/notebooks.py notebooks/02_altclip.py --output elsewhere

A notebook is a Python file of cells (jupytext's py:percent); the .ipynb of the same name has its outputs too.
"""

import argparse
import os
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parents[1] / "notebooks"
LARGEST = 400_000  # bytes of one .ipynb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="all by default")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder of what is written; that of the sources")
    options = parser.parse_args()
    for source in options.sources or sorted(HERE.glob("[0-9]*.py")):
        began = time.perf_counter()
        notebook = jupytext.read(source)
        NotebookClient(
            notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(HERE)}}
        ).execute()
        tidy(notebook, source.name)
        text = nbformat.writes(notebook) + "\n"
        if len(text.encode()) > LARGEST:
            raise SystemExit(f"{source.name}: its notebook has {len(text.encode()):,} bytes, more than {LARGEST:,}")
        (options.output / source.name).with_suffix(".ipynb").write_text(text, "utf-8")
        print(f"{source.name}: {time.perf_counter() - began:.0f} s, {len(text.encode()) / 1000:.0f} kB", flush=True)


def tidy(notebook: nbformat.NotebookNode, name: str) -> None:
    """Takes out progress bars and what is another each time; raises SystemExit for a warning."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        if cell.cell_type != "code":
            continue
        cell.metadata.clear()
        said = "".join(output.text for output in cell.outputs if output.get("name") == "stderr")
        if "Warning" in said or "missing from font" in said:
            raise SystemExit(f"{name}, cell {number}: {said}")
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # bars that a stored notebook leaves out anyway
    main()
