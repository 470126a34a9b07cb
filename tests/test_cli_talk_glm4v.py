"""flax-vlm generate and flax-vlm chat with a GLM-4V."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import cli
from flax_vlm.chat import without_beginning
from flax_vlm.processing import GLM4VProcessor
from tests.talkers import tiny_glm4v

LIMIT = 8
Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, the same with sampling as its default, and two pictures."""
    folder = tmp_path_factory.mktemp("talk")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    tiny = tiny_glm4v()
    tiny.save_pretrained(folder / "greedy")
    assert tiny.generation_config is not None
    tiny.generation_config = replace(tiny.generation_config, do_sample=True, temperature=0.8, top_p=0.8)
    tiny.save_pretrained(folder / "sampling")
    return folder


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Any:
    return flax_vlm.from_pretrained(folder / "greedy")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Standard output and standard error of a command, in the folder of the pictures."""
    monkeypatch.chdir(folder)

    def run(command: str, *arguments: str, model: str = "greedy", lines: str = "", code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert cli.main([command, model, *arguments, "--max-new-tokens", str(LIMIT)]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def ask(vlm: Any, prompt: Any, **options: Any) -> str:
    """What `generate` answers, without the line break in front."""
    is_chat = isinstance(prompt[0], dict)
    inputs = vlm.processor(prompt, add_generation_prompt=True)
    cache = vlm.model.init_cache(1, 512) if is_chat else None  # as large as that of the command, to compile less
    out = vlm.generate(**inputs, max_new_tokens=LIMIT, cache=cache, **options)
    answer = vlm.processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :])
    assert answer.startswith("\nhello ")
    return answer[1:]


def test_generate(run: Run, vlm: Any) -> None:
    out, err = run("generate", "--prompt", "What is this?", "--image", "0.png")
    assert out == ask(vlm, [Path("0.png"), "What is this?"]) + "\n"
    assert not err
    assert out == run("generate", "--prompt", "<image>What is this?", "--image", "0.png")[0]
    others = [run("generate", "--prompt", "What is this?", *picture)[0] for picture in (["--image", "1.png"], [])]
    assert len({out, *others}) == 3, "an answer should depend on its picture"


def test_generate_takes_the_likeliest_tokens_unless_told_otherwise(run: Run, vlm: Any) -> None:
    question = ["generate", "--prompt", "What is this?", "--image", "0.png"]
    plain, _ = run(*question)
    assert run(*question, model="sampling")[0] == plain
    assert run(*question, "--num-beams", "2", model="sampling")[0].startswith("hello ")
    sampled, _ = run(*question, "--temperature", "9", "--seed", "1", model="sampling")
    assert run(*question, "--temperature", "9", "--seed", "1", model="sampling")[0] == sampled != plain


def test_stop_strings_end_an_answer(vlm: Any) -> None:
    words = ask(vlm, ["hello"]).split()
    assert words[2] not in words[:2] and len(words) > 3
    assert ask(vlm, ["hello"], stop_strings=words[2][1:]).split() == words[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "What is <image>?", "--image", "0.png"], "got a picture behind the text 'What is '"),
        (["--prompt", "a" * 300], "expected at most seq_length, 256"),
    ],
)
def test_mistakes_of_generate(run: Run, arguments: list[str], message: str) -> None:
    out, err = run("generate", *arguments, code=2)
    assert not out
    assert err.startswith("flax-vlm: ") and message in err and len(err.splitlines()) <= 2


def test_what_the_layout_has_in_front_is_not_printed() -> None:
    glm4v: Any = SimpleNamespace(processor=GLM4VProcessor)
    assert list(without_beginning(glm4v, iter(["\n", "A", "\n", "\ndog"]))) == ["", "A", "\n", "\ndog"]
    assert list(without_beginning(glm4v, iter(["A\n", "\ndog"]))) == ["A\n", "\ndog"]


def replies(vlm: Any, *turns: Any) -> str:
    """What a chat prints, where each turn reads all that was said before."""
    messages: list[dict[str, Any]] = []
    answers = []
    for text, *pictures in ([turn] if isinstance(turn, str) else turn for turn in turns):
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        answers.append(ask(vlm, messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    return "".join(f"{answer}\n" for answer in answers)


def test_chat(run: Run, vlm: Any) -> None:
    out, err = run("chat", lines="/image 0.png\nhello\nworld\n/image 1.png\nis\n")
    assert out == replies(vlm, ["hello", Path("0.png")], "world", ["is", Path("1.png")])
    assert len(err.splitlines()) == 1


def test_chat_goes_on_where_the_model_has_no_more_positions(run: Run, vlm: Any) -> None:
    out, err = run("chat", lines=f"hello\n{'a' * 300}\nworld\n")
    assert out == replies(vlm, "hello", "world")
    assert "seq_length" in err
