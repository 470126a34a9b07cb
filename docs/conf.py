"""How Sphinx makes a site of these pages, of the docstrings and of the notebooks: `make docs`, into build/docs.

A warning is an error there. Neither torch nor transformers is needed. Notebooks are not executed: they show what is
stored in them.
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import docstrings  # noqa: E402, beside this file

import flax_vlm  # noqa: E402

project = "flax_vlm"
author = "the authors of flax_vlm"
project_copyright = "the authors of flax_vlm, Apache-2.0"
version = release = flax_vlm.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["pictures/*.py"]
html_theme = "furo"
html_title = f"flax_vlm {version}"
html_show_sourcelink = False

myst_heading_anchors = 3  # links to headings, as on GitHub
nb_execution_mode = "off"

autodoc_default_options = {"special-members": "__call__"}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # FSDP_TENSOR, not all that it holds
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # signatures have them

NOTEBOOKS = HERE / "notebooks"  # Sphinx reads what is below this folder; git does not know them


def copy_notebooks() -> None:
    shutil.rmtree(NOTEBOOKS, ignore_errors=True)
    NOTEBOOKS.mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, NOTEBOOKS)


copy_notebooks()


def setup(app):
    docstrings.setup(app)
