"""The README's example runs as it stands, and its files are there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with np.load(ROOT / "examples" / "altclip-digits" / "heldout.npz") as held_out:
        Image.fromarray(held_out["images"][np.flatnonzero(held_out["labels"] == 3)[0]]).save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "back" / "model.safetensors").is_file()
    assert names["out"].logits_per_image[0].argmax() == 1  # the three, not the seven
    assert names["vlm"].model.scan_layers


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
