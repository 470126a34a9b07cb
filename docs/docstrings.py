"""From this project's docstrings, which are plain text with a little Markdown, to what Sphinx reads.

Between single backticks is code, an indented block is shown as it stands, and stars and underscores mean themselves.
Sections (`Args:` and the like) are left to napoleon, which runs after this.
"""

import inspect
import re
from typing import Any

SECTIONS = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_SEVERAL = re.compile(r"^ +\w+(?:, \w+)+:")
_GAP = re.compile(r"(?<=\S) {3,}(?=\S)")  # between the entries of a legend
# A few types have names of their own, which Sphinx does not know.
_DTYPE = r"str \| type\[[~\w.]*Any\] \| [~\w.]*dtype \| [~\w.]*SupportsDType \| [~\w.]*Any"
SHORTER = (
    (_DTYPE, "Dtype"),
    (r"~?jaxtyping\.", ""),
    (r"~?\bjaxlib\._jax\.", ""),
    (r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1"),
    (r"<function (?:[\w.]*<locals>\.)?(\w+)[^>]*>", r"\1"),
    (r"(?:, \*)?, parent: [^=]*= <flax[^>]*>(?:, name: [^=]* = None)?", ""),
    (r"<[\w.]+ object[^>]*>", "..."),
)
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
        if place == "section":
            line = _SEVERAL.sub(lambda names: names[0].replace(", ", ","), line)  # napoleon takes one name for a type
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
    """Types as they stand in the source, and nothing of what linen adds to the fields of a module."""
    return _as_written(signature), _as_written(returns)


def _as_written(signature: str | None) -> str | None:
    for pattern, written in SHORTER:
        signature = signature and re.sub(pattern, written, signature)
    return signature


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    if name == "__call__":
        return "__call__" not in vars(type(obj)) and not inspect.isfunction(obj)
    if name in LINEN and not inspect.isfunction(obj):
        return True
    if inspect.isclass(obj) and obj.__name__ != name:  # param_dtype = jnp.float32 is no class of ours
        return True
    return None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
