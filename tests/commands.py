"""Runs the commands of documents in this process, on stand-ins; those that would take long, as far as they are quick.

A command that is not known here is an error, so that a document has none that nothing runs.
"""

import contextlib
import glob
import io
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax

from benchmarks import __main__ as benchmarks_command
from benchmarks import bits, contest, parity
from benchmarks.cases import Case
from benchmarks.conversion import __main__ as conversion_command
from benchmarks.conversion import contest as conversion_contest
from flax_vlm import cli
from flax_vlm.cli import plan, programs
from flax_vlm.parallel import aot, roofline
from tests import stand_ins, tiny_names
from tests.markdown import ROOT, Command

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
SAID = "What is this?\n/image cat.jpg\nAnd this?\n"  # in a chat
BRIEF = {"generate": {"--max-new-tokens": "4"}, "chat": {"--max-new-tokens": "4"}, "eval": {"--max-new-tokens": "4"}}
DIFFERS = 1  # the exit code of a comparison


class Unknown(Exception):
    """A command that nobody has said how to run."""


class Runner:
    """Where the commands of a document are run, one after the other."""

    def __init__(self, folder: Path, models: stand_ins.Models) -> None:
        self.folder = folder
        self.models = models

    def run(self, command: Command, slow: bool = False) -> None:
        """Runs it, or with slow=False what of it is quick. The folder has to be the current one."""
        find(command)(self, command.words, slow)

    def flax_vlm(self, words: list[str], slow: bool) -> None:
        words = [self.models.named_in(word) for word in words]
        words = [each for word in words for each in (sorted(glob.glob(word)) if "*" in word else [word])]
        name = words[1]
        if name == "plan":
            return self._plan(words, slow)
        if name == "train" and "--print-config" not in words and slow:
            changed = stand_ins.RUN | {"--model": str(self.models.native)}
            self._says(stand_ins.with_options(words[1:], changed))
            assert (Path(words[words.index("--output") + 1]) / "model" / "config.json").is_file()
        elif name == "train":
            printed = self._says([word for word in words[1:] if word != "--print-config"] + ["--print-config"])
            assert json.loads(printed)["data"]["paths"]
            if "--print-config" not in words:
                stand_ins.trained(self.models, words, self.folder)
        else:
            expected = DIFFERS if "--diff" in words else 0
            self._says(stand_ins.with_options(words[1:], BRIEF.get(name, {})), expected)

    def _plan(self, words: list[str], slow: bool) -> None:
        """For the CPU of this process; the program is traced and compiled only where there is time."""
        chip = {"cpu": roofline.Chip(1e12, 2**34, 1e9, 1e9)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(aot, "devices", lambda topology, slices: jax.devices()[:1]))
            stack.enter_context(mock.patch.dict(roofline.CHIPS, chip))
            if not slow:
                stack.enter_context(mock.patch.object(programs, "train_step"))
                stack.enter_context(mock.patch.object(plan, "describe", lambda *_: {"fits": True}))
            printed = self._says([*stand_ins.planned(words, self.folder)[1:], "--json"])
        assert json.loads(printed)["programs"][0]["fits"]

    def _says(self, arguments: list[str], expected: int = 0) -> str:
        out, errors = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            mock.patch.object(sys, "stdin", io.StringIO(SAID)),
        ):
            try:
                code: object = cli.main(arguments)
            except SystemExit as end:
                code = end.code or 0
        assert code == expected, f"flax-vlm {' '.join(arguments)} ended with {code}: {errors.getvalue()}"
        assert out.getvalue() or "--quiet" in arguments, "it said nothing"
        return out.getvalue()

    def benchmarks(self, words: list[str], slow: bool) -> None:
        """`python -m benchmarks`: the first case of each kind, tiny; else only whether there are such cases."""
        arguments = [*words[3:], "--quick", "--allow-busy", "--json", str(self.folder / "benchmarks.json")]
        kinds: set[str] = set()
        really = contest.run_case

        def run_case(module: str, case: Case, plan: contest.Plan) -> list[contest.Result]:
            is_first = module not in kinds
            kinds.add(module)
            return really(module, case, plan) if slow and is_first else []

        with mock.patch.object(contest, "run_case", run_case), _printed() as out:
            assert benchmarks_command.main(arguments) == 0, out.getvalue()
        assert kinds

    def parity(self, words: list[str], slow: bool) -> None:
        """Its table in float32; else only its options."""
        without = mock.patch.object(parity, "compare", lambda family, dtype: [])
        with contextlib.nullcontext() if slow else without, _printed() as out:
            assert parity.main([*words[3:], "--dtype", "float32"]) == 0
        assert not slow or out.getvalue().count("| float32 |") == 4

    def bits(self, words: list[str], slow: bool) -> None:
        """Its table of few questions; else only its options."""
        without = mock.patch.object(bits, "compare", lambda name, example, ask, every: [])
        with contextlib.nullcontext() if slow else without, _printed() as out:
            assert bits.main([*words[3:], "--every", "100"]) == 0
        assert not slow or out.getvalue().count("| int4, ") == 8

    def conversion(self, words: list[str], slow: bool) -> None:
        """`plan` as it is; measured, at tiny sizes and not at all where it has to be quick."""
        arguments = ["--workdir", str(self.folder), "--json", str(self.folder / "conversion.json"), *words[3:]]
        arguments += [] if "plan" in arguments or "--allow-busy" in arguments else ["--allow-busy"]
        without = mock.patch.object(conversion_contest, "run", lambda model, plan: [])
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(_printed())
            if "plan" not in arguments:
                stack.enter_context(tiny_names.in_use(self.folder / "names"))
                if not slow:
                    stack.enter_context(without)
            assert conversion_command.main(arguments) == 0, out.getvalue()
        assert out.getvalue()

    def make(self, words: list[str], slow: bool) -> None:
        """A target that there is; what it picks of the tests is there."""
        targets = [word for word in words[1:] if "=" not in word]
        assert targets and set(targets) <= set(TARGETS), f"{targets}: not in the Makefile"
        for word in words[1:]:
            variable, given, value = word.partition("=")
            if not given:
                continue
            assert variable in MAKEFILE, f"{variable}: the Makefile does not know it"
            for picked in re.findall(r"-k (\w+)", value):
                assert any(picked in name for name in _names_of_tests()), f"-k {picked} picks nothing"

    def pytest(self, words: list[str], slow: bool) -> None:
        """Files that are there, which `make test` runs."""
        assert words[1:] and all((ROOT / word).is_file() for word in words[1:]), words

    def script(self, words: list[str], slow: bool) -> None:
        """A file that is there; tests of its own run it."""
        assert (ROOT / words[1]).is_file(), words

    def pip(self, words: list[str], slow: bool) -> None:
        """Extras that there are."""
        assert words[1] in ("install", "freeze"), words
        for word in words[2:]:
            found = re.fullmatch(r"(?:\.|flax-vlm)(?:\[([\w,]+)\])?", word)
            assert found and set((found[1] or "torch").split(",")) <= EXTRAS.keys(), word


def find(command: Command) -> Callable[[Runner, list[str], bool], None]:
    """What runs it.

    Raises:
      Unknown: where nothing does.
    """
    words = command.words
    if words[:2] == ["python", "-m"]:
        known = {"benchmarks": Runner.benchmarks, "benchmarks.parity": Runner.parity}
        known |= {"benchmarks.bits": Runner.bits, "benchmarks.conversion": Runner.conversion}
        chosen = known.get(words[2])
    else:
        known = {"flax-vlm": Runner.flax_vlm, "make": Runner.make, "pytest": Runner.pytest, "pip": Runner.pip}
        known |= {"python": Runner.script, ".ci/run": lambda runner, words, slow: None}
        chosen = known.get(words[0])
    if chosen is None or (words[0] == "flax-vlm" and words[1] not in flax_vlm_commands()):
        raise Unknown(f"{command}: tests/commands.py does not know how to run it")
    return chosen


def is_slow(command: Command) -> bool:
    """Whether there is more to it than what runs quickly."""
    words = command.words
    if words[:2] == ["python", "-m"]:
        return "plan" not in words
    return words[0] == "flax-vlm" and words[1] in ("plan", "train") and "--print-config" not in words


def flax_vlm_commands() -> set[str]:
    """Their names, from the files that register them."""
    text = "".join(file.read_text("utf-8") for file in (ROOT / "flax_vlm" / "cli").glob("*.py"))
    found = re.findall(r"^@app\.command(?:\(name=\"(\w+)\"\))?\ndef (\w+)", text, re.MULTILINE)
    return {named or function for named, function in found}


def check_mention(command: Command, runner: Runner) -> None:
    """A command in the midst of a text: it is there, and so are the options that are named."""
    words = command.words
    if words == ["flax-vlm", "--help"]:
        return None
    find(command)
    if words[0] != "flax-vlm":
        return runner.run(command)
    given = [word for word in words[2:] if word.startswith("--")]
    assert given == words[2:], f"{command}: a whole command belongs into a block of its own, which is run"
    with _printed() as out, contextlib.suppress(SystemExit):
        cli.main([words[1], "--help"])
    missing = [option for option in given if option not in out.getvalue()]
    assert not missing, f"{command}: has no {', '.join(missing)}"


def _names_of_tests() -> Iterator[str]:
    for file in (ROOT / "tests").rglob("test_*.py"):
        yield file.stem
        yield from re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)


@contextlib.contextmanager
def _printed() -> Iterator[io.StringIO]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out
