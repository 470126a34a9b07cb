"""The examples' scripts and recipes, from pictures to a table of results, with a few steps between them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flax_vlm.cli.train import read_recipe
from flax_vlm.training.config import check

EXAMPLES = Path(__file__).parents[2] / "examples"
ALL = pytest.mark.parametrize("example", ["altclip-digits", "glm4v-digits", "idefics-digits"])


@ALL
def test_recipes_are_right(example: str) -> None:
    config = read_recipe(EXAMPLES / example / "recipe.py")
    check(config)
    build = EXAMPLES.parent / "build" / example
    assert {Path(path).parent for path in (config.model, config.output, *config.data.paths)} == {build}


@pytest.mark.slow
@ALL
def test_train_and_measure(example: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("fonts", "__pycache__"))
    script = tmp_path / "examples" / example / "train.py"
    quick = ["--tower-steps", "2"] if example == "glm4v-digits" else []
    fields = [*quick, "--steps", "3", "--optimizer.warmup-steps", "1", "--log-every", "1"]
    done = subprocess.run(
        [sys.executable, str(script), "--validate", "240", *fields], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout and "English" in done.stdout
    assert "is skipped" not in done.stderr, "a record of which nothing could be made"
    trained = tmp_path / "build" / example / "run" / "model"
    assert (trained / "config.json").is_file()
    for file in (EXAMPLES / example / "checkpoint").iterdir():
        assert (script.parent / "checkpoint" / file.name).read_bytes() == file.read_bytes(), "validation writes nothing"
