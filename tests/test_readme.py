"""The README's examples run as they stand, and its files are there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with np.load(ROOT / "examples" / "altclip-digits" / "heldout.npz") as held_out:
        for name, digit in (("digit.png", 3), ("other.png", 8)):
            Image.fromarray(held_out["images"][np.flatnonzero(held_out["labels"] == digit)[0]]).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(first, "README.md", "exec"), names)
    assert (tmp_path / "back" / "model.safetensors").is_file()
    assert names["out"].logits_per_image[0].argmax() == 1  # the three, not the seven
    assert names["vlm"].model.scan_layers
    exec(compile(second, "README.md", "exec"), names)
    assert [answer.strip() for answer in names["answers"]] == ["eight.", "three."]
    assert capsys.readouterr().out.strip() == "eight."


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
