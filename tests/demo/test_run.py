"""`flax-vlm demo` as a whole."""

from pathlib import Path

import pytest
from PIL import Image

from flax_vlm import demo
from flax_vlm.demo import contact_sheet
from flax_vlm.demo.conversation import SHOWN

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_run_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(EXAMPLES, tmp_path / "new" / "folder")
    printed = capsys.readouterr().out
    for language in demo.read_languages(EXAMPLES / "altclip-digits"):
        assert language.language in printed and language.prompt(demo.EXAMPLE_WORD) in printed
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [demo.SHEET]
    with Image.open(tmp_path / "new" / "folder" / demo.SHEET) as sheet:
        assert sheet.size == contact_sheet.SIZE
        colors = sheet.convert("RGB").getcolors(1 << 24)
        assert colors is not None and len(colors) > 100
    _, talk = printed.split("idefics-digits")[0], printed.split("idefics-digits")[-1]
    assert talk.count("①") == 2 * len(SHOWN), "above the picture and in the prompt"
    assert "③" in talk


def test_run_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the folder of this project's examples; altclip-digits is not there"):
        demo.run(tmp_path, tmp_path)
