"""From this project's docstrings, which are plain text with a little Markdown, to what Sphinx reads.

Between single backticks is code, an indented block is shown as it stands, and stars and underscores mean themselves. The
sections (`Args:` and the like) are left to napoleon, which runs after this.
"""

import inspect
import re
from typing import Any

SECTIONS = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# What linen adds to every module.
LINEN = ("parent", "name", "scope")


def as_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring, as reStructuredText."""
    found: list[str] = []
    in_section = in_literal = False
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        indented = line.startswith(" ")
        if line and not indented:
            in_literal = False
            in_section = SECTIONS.match(line) is not None
        elif indented and not in_section and not in_literal and (number == 0 or not _is_list(before)):
            in_literal = True
            if found and found[-1]:
                found.append("")
            found += ["::", ""]
        found.append(line if in_literal else _escaped(line))
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if in_literal and line and following and not following.startswith(" "):
            found.append("")
        elif not in_literal and _is_list(following) and line and not _is_list(line) and not in_section:
            found.append("")
    return found


def _is_list(line: str) -> bool:
    return re.match(r" *(?:[-*]|\d+\.) ", line) is not None


def _escaped(line: str) -> str:
    """Backticks doubled, and what reStructuredText would take for markup escaped, but for the star of a list."""
    parts = _CODE.split(line)
    for number, part in enumerate(parts):
        if number % 2:
            parts[number] = f"``{part}``"
        else:
            bullet = re.match(r" *\* ", part) if number == 0 else None
            begin = bullet.end() if bullet else 0
            parts[number] = part[:begin] + re.sub(r"([*|\\]|_\b|\b_(?=\W|$))", r"\\\1", part[begin:])
    return "".join(parts)


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
