"""Cuts Inter and Noto Sans CJK down to the characters that the demo's contact sheet shows.

On Debian: `apt-get install fonts-inter fonts-noto-cjk`, then `python examples/altclip-digits/fonts/make.py` where
fonttools is installed (it comes with matplotlib). Both fonts are under the SIL Open Font License, see OFL.txt.
"""

import json
import string
from pathlib import Path

from fontTools import subset

HERE = Path(__file__).parent
SYSTEM = Path("/usr/share/fonts/opentype")
WEIGHTS = {"Regular": "Regular", "Bold": "SemiBold"}  # of Noto Sans CJK, and of Inter beside it
# The collection of Noto Sans CJK holds a face for each country's letter forms. Hangul is the same in all of them.
FACES = {"zh": 2, "ja": 0, "ko": 1}


def main() -> None:
    languages = json.loads((HERE.parent / "captions.json").read_text("utf-8"))
    shown = {entry["code"]: characters(entry) for entry in languages}
    latin = set(string.printable.strip()) | set(" ·–—×→…’“”✓✗")
    for code in shown.keys() - FACES.keys():
        latin |= shown[code]
    for noto, inter in WEIGHTS.items():
        cut(SYSTEM / f"inter/Inter-{inter}.otf", 0, latin, f"Inter-{inter}.otf")
        for code, face in FACES.items():
            cut(SYSTEM / f"noto/NotoSansCJK-{noto}.ttc", face, shown[code], f"NotoSansCJK{code}-{noto}.otf")


def characters(entry: dict) -> set[str]:
    """What the sheet writes in one language: its own name, the sentences and the ten words."""
    return set(entry["native"] + entry["zero_shot"] + "".join(names[0] for names in entry["words"]))


def cut(source: Path, face: int, wanted: set[str], name: str) -> None:
    """Writes `name` beside this file: the characters `wanted` of one face of `source`."""
    options = subset.Options(font_number=face, hinting=False, desubroutinize=True, layout_features=["kern", "tnum"])
    font = subset.load_font(str(source), options)
    missing = {character for character in wanted if ord(character) not in (font.getBestCmap() or {})}
    if missing:
        raise SystemExit(f"{source.name} has no {' '.join(sorted(missing))}")
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(wanted))
    subsetter.subset(font)
    subset.save_font(font, str(HERE / name), options)
    print(f"{name}: {len(wanted)} characters, {(HERE / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
