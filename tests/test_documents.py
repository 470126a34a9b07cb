"""README, CONTRIBUTING and docs/: what they show runs, from top to bottom, and their links lead somewhere.

A document is run in a folder of its own, where small stand-ins have the names of what it tells of: its python blocks in
one namespace, its commands in this process. What takes long is run by itself, as a slow test.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import commands, markdown, stand_ins
from tests.markdown import DOCUMENTS, SHELL, Block, Command, name

LANGUAGES = {"python", SHELL, "text", "json", "{toctree}", "{eval-rst}"}
GUIDES = [document for document in DOCUMENTS if document.parent.name != "api"]
RUN = [each for each in GUIDES if {block.language for block in markdown.blocks(each.read_text())} & {"python", SHELL}]
# One of each: what stands in two documents runs once.
SLOW = {each.text: each for document in RUN for each in markdown.shell_commands(document) if commands.is_slow(each)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> stand_ins.Models:
    return stand_ins.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def runner(models: stand_ins.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> commands.Runner:
    """In a folder with files as a reader would have them, which is the current one."""
    stand_ins.fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(markdown.ROOT))
    return commands.Runner(tmp_path, models)


def readme(names: dict[str, Any], said: str) -> None:
    assert names["out"].sequences.shape[0] == 2
    assert [answer.strip() for answer in names["answers"]] == ["eight.", "three."]
    assert said.strip() == "eight."
    assert Path("back", "model.safetensors").is_file()
    records = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [record["finish_reason"] for record in records] == ["length"] * len(records) != []


# What a document says comes of it, beyond that it runs.
COMES_OF_IT: dict[str, Callable[[dict[str, Any], str], None]] = {"README.md": readme}


@pytest.mark.parametrize("document", RUN, ids=name)
def test_it_runs(document: Path, runner: commands.Runner, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in markdown.blocks(document.read_text("utf-8")):
        if block.language == "python":
            _execute(document, block, names, runner.models)
        elif block.language == SHELL:
            for command in markdown.commands_of(block, name(document)):
                runner.run(command)
    if check := COMES_OF_IT.get(name(document)):
        check(names, capsys.readouterr().out)


def _execute(document: Path, block: Block, names: dict[str, Any], models: stand_ins.Models) -> None:
    code = "\n" * (block.line - 1) + models.named_in(block.text)  # so that an error names the document's line
    exec(compile(code, str(document), "exec"), names)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("command", SLOW.values(), ids=str)
def test_what_takes_long_runs(command: Command, runner: commands.Runner) -> None:
    runner.run(command, slow=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_its_commands_are_known(document: Path, runner: commands.Runner) -> None:
    for command in markdown.shell_commands(document):
        commands.find(command)
    for command in markdown.mentions(document):
        commands.check_mention(command, runner)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_command_hides(document: Path) -> None:
    for block in markdown.blocks(document.read_text("utf-8")):
        assert block.language in LANGUAGES, f"line {block.line}: {block.language!r} is a language that nothing runs"
        hidden = [line for line in block.text.splitlines() if markdown.looks_like_a_command(line)]
        assert block.language == SHELL or not hidden, f"line {block.line}: {hidden[0]!r} belongs into a {SHELL} block"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_its_links_lead_somewhere(document: Path) -> None:
    for link in markdown.links(document):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            assert anchor in markdown.anchors(target), f"{link}: there is no such heading"


def test_the_readme_is_one_page() -> None:
    text = (markdown.ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 170
    wanted = "Fifteen lines, Two commands, Families, How fast, Convert, Generate, Train, Why linen".split(", ")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flax-vlm fly", "does not know how to run it"),
        ("python -m benchmarks.fly", "does not know how to run it"),
        ("gcloud ssh", "does not know how to run it"),
    ],
)
def test_an_unknown_command_is_an_error(text: str, message: str) -> None:
    with pytest.raises(commands.Unknown, match=message):
        commands.find(Command("a document", 1, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("make fly", "not in the Makefile"),
        ("make test WINGS=2", "the Makefile does not know it"),
        ('make test PYTEST_ARGS="-k no_test_is_called_so"', "picks nothing"),
        ("pytest tests/test_fly.py", "test_fly"),
        ("python docs/fly.py", "fly"),
        ("pip install flax-vlm[wings]", "wings"),
        ("flax-vlm inspect nowhere", "ended with 2"),
        ("flax-vlm train recipes/forkme.py --wings 2", "ended with"),
        ("python -m benchmarks no-case-is-called-so", None),
    ],
)
def test_a_command_that_cannot_work_fails(
    text: str, message: str | None, runner: commands.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((AssertionError, SystemExit), match=message):
        runner.run(Command("a document", 1, text))


def test_a_mention_names_what_there_is(runner: commands.Runner) -> None:
    commands.check_mention(Command("a document", 1, "flax-vlm verify --forward"), runner)
    for text, message in [("flax-vlm verify --backward", "has no --backward"), ("flax-vlm verify a b", "block")]:
        with pytest.raises(AssertionError, match=message):
            commands.check_mention(Command("a document", 1, text), runner)


def test_blocks_and_commands_are_read_as_they_stand() -> None:
    text = "a\n\n1. b\n\n   ```shell\n   flax-vlm inspect 'a b' \\\n       --depth 2  # so\n   make test\n   ```\n"
    (block,) = markdown.blocks(text)
    assert (block.line, block.language) == (6, SHELL)
    first, second = markdown.commands_of(block, "x")
    assert first.words == ["flax-vlm", "inspect", "a b", "--depth", "2"] and (first.line, second.line) == (6, 8)
    assert markdown.looks_like_a_command("JAX_PLATFORMS=cpu flax-vlm train x")


def test_anchors_are_those_of_headings(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# One, `two`\n\n```text\n# none\n```\n\n## What's 3-fold?\n\n[a](#b) `[c](d)`\n")
    assert markdown.anchors(document) == {"one-two", "whats-3-fold"}
    assert markdown.links(document) == ["#b"]
