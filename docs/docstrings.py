"""From this project's docstrings, which are plain text with a little Markdown, to what Sphinx reads.

Between single backticks is code, an indented block is shown as it stands, and stars and underscores mean themselves.
Sections (`Args:` and the like) are left to napoleon, which runs after this.
"""

import inspect
import re
from typing import Any

SECTIONS = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_GAP = re.compile(r"(?<=\S) {3,}(?=\S)")  # between the entries of a legend
# What linen adds to every module.
LINEN = ("parent", "name", "scope")


def as_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring, as reStructuredText."""
    found: list[str] = []
    place = "text"  # or a section, a list, a literal block
    for line in lines:
        indented = line.startswith(" ")
        if place == "literal" and line and not indented:
            found.append("")
        if line and not indented:
            was, place = place, _place_of(line)
            if place == "list" and was != "list" and found and found[-1]:
                found.append("")
        elif not line and place == "list":
            place = "text"
        elif line and place == "text":
            place = "literal"
            found += ["", "::", ""]
        found.append(line if place == "literal" else _escaped(line))
    return found


def _place_of(line: str) -> str:
    if SECTIONS.match(line):
        return "section"
    return "list" if re.match(r"(?:[-*]|\d+\.) ", line) else "text"


def _escaped(line: str) -> str:
    """Backticks doubled, and what reStructuredText would take for markup escaped, but for the star of a list."""
    parts = _CODE.split(line)
    for number, part in enumerate(parts):
        if number % 2:
            parts[number] = f"``{part}``" + ("\\ " if re.match(r"\w", parts[number + 1]) else "")
        else:
            bullet = re.match(r" *\* ", part) if number == 0 else None
            begin = bullet.end() if bullet else 0
            parts[number] = part[:begin] + re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part[begin:])
    return _GAP.sub(" · ", "".join(parts))


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def process_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any) -> Any:
    """Without what linen adds to the fields of a module."""
    if what != "class" or not signature:
        return None
    shown = re.sub(r", parent: .*?= <flax[^>]*>", "", signature)
    shown = re.sub(r", name: (?:str \| None|Optional\[str\]|Union\[str, None\]) = None(?=\))", "", shown)
    return shown, returns


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    return True if name in LINEN and not inspect.isfunction(obj) else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
