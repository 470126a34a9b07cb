"""What the tests of documents read in them: fenced blocks, commands, links and the places that these lead to."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
SHELL = "shell"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
# Words that a command begins with; a name in capitals in front of one is a variable of the environment.
_PROGRAMS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:(?:flax-vlm|python|make|pytest|pip) |\.ci/run)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line, counted from 1."""

    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command as a person types it, without comments."""

    document: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """Without variables of the environment in front."""
        words = shlex.split(self.text)
        return words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0) :]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """The fenced blocks, without their indent."""
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        lines = [line[indent:] for line in match["text"].splitlines()]
        found.append(Block(text[: match.start("text")].count("\n") + 1, match["language"].strip(), "\n".join(lines)))
    return found


def commands_of(block: Block, document: str) -> list[Command]:
    """A command for each line of a shell block; a backslash at the end of one goes on with the next."""
    found, pending, began = [], "", 0
    for number, line in enumerate(block.text.splitlines(), block.line):
        began = began if pending else number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        words = shlex.split(pending, comments=True)
        if words:
            found.append(Command(document, began, shlex.join(words)))
        pending = ""
    return found


def shell_commands(document: Path) -> list[Command]:
    """All commands that stand in shell blocks."""
    found = [block for block in blocks(document.read_text("utf-8")) if block.language == SHELL]
    return [command for block in found for command in commands_of(block, name(document))]


def mentions(document: Path) -> list[Command]:
    """Commands in the midst of a text, between backticks."""
    text = without_blocks(document.read_text("utf-8"))
    return [
        Command(name(document), text[: match.start()].count("\n") + 1, " ".join(match[1].split()))
        for match in _CODE.finditer(text)
        if _PROGRAMS.match(match[1])
    ]


def looks_like_a_command(line: str) -> bool:
    return _PROGRAMS.match(line.strip().removeprefix("$ ")) is not None


def without_blocks(text: str) -> str:
    """The text with its fenced blocks blanked, so that lines keep their numbers."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def links(document: Path) -> list[str]:
    """Where links and pictures point to."""
    return _LINK.findall(_CODE.sub("", without_blocks(document.read_text("utf-8"))))


def anchors(document: Path) -> set[str]:
    """Those of the headings: small letters, hyphens for spaces, and nothing else but letters and digits."""
    headings = _HEADING.findall(without_blocks(document.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
