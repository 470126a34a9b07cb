"""flax-vlm generate and flax-vlm chat, as a person types them."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import cli, generation
from tests.talkers import END, FAKE, IMAGE, tiny_idefics

ALTCLIP = Path(__file__).parent.parent / "examples" / "altclip-digits" / "checkpoint"
LIMIT = 8
Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny instruct model, one of no chats and one without a tokenizer; and two pictures beside them."""
    folder = tmp_path_factory.mktemp("talk")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "words.png").write_text("not a picture")
    tiny_idefics([FAKE, IMAGE, END]).save_pretrained(folder / "instruct")
    tiny_idefics([FAKE, IMAGE]).save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*", "preprocessor*"))
    return folder


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Any:
    return flax_vlm.from_pretrained(folder / "instruct")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Standard output and standard error of a command, in the folder of the pictures."""
    monkeypatch.chdir(folder)

    def run(command: str, *arguments: str, model: str = "instruct", lines: str = "", code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        limit = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", str(LIMIT)]
        assert cli.main([command, model, *arguments, *limit]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def ask(vlm: Any, prompt: Any, **options: Any) -> str:
    """What `generate` answers, which may not say the tokens of the layout, and stops where an utterance ends."""
    is_chat = isinstance(prompt[0], dict)
    inputs = vlm.processor(prompt, add_generation_prompt=is_chat, pad_to_multiple_of=64 if is_chat else None)
    fake, image, end = (vlm.processor.tokenizer.backend.token_to_id(token) for token in (FAKE, IMAGE, END))
    options |= {"eos_token_id": [2, end], "bad_words_ids": [[fake], [image]], "max_new_tokens": LIMIT}
    cache = vlm.model.init_cache(1, 512) if is_chat else None  # as large as that of the command, to compile less
    out = vlm.generate(**inputs, **options, cache=cache)
    return vlm.processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :])


TWO = ["--image", "0.png", "--image", "1.png"]


def test_generate_puts_pictures_in_their_places(run: Run, vlm: Any) -> None:
    out, err = run("generate", "--prompt", "<image>one <image> two", *TWO)
    assert out == ask(vlm, [Path("0.png"), "one", Path("1.png"), "two"]) + "\n"
    assert not err
    assert run("generate", "--prompt", "<image>one <image> two", "--image", "1.png", "--image", "0.png")[0] != out
    first, _ = run("generate", "--prompt", "one two", *TWO)
    assert first == run("generate", "--prompt", "<image><image>one two", *TWO)[0] != out


def test_generate_from_text_alone(run: Run, vlm: Any) -> None:
    out, _ = run("generate", "--prompt", "one\\ntwo")
    assert out == ask(vlm, ["one\ntwo"]) + "\n" == run("generate", "--prompt", "one\ntwo")[0]
    assert out != run("generate", "--prompt", "one two")[0]


def test_generate_with_a_model_of_no_chats(run: Run, folder: Path) -> None:
    base: Any = flax_vlm.from_pretrained(folder / "base")
    inputs = base.processor(["one two"])
    pictures = [[base.processor.tokenizer.backend.token_to_id(token)] for token in (FAKE, IMAGE)]
    out = base.generate(**inputs, bad_words_ids=pictures, max_new_tokens=LIMIT).sequences
    expected = base.processor.decode(out[0, inputs["input_ids"].shape[1] :])
    assert run("generate", "--prompt", "one two", model="base")[0] == expected + "\n" != "\n"


def test_generate_searches_and_samples(run: Run, vlm: Any) -> None:
    out, _ = run("generate", "--prompt", "one two", "--num-beams", "3")
    assert out == ask(vlm, ["one two"], num_beams=3) + "\n"
    sampled = ["generate", "--prompt", "one two", "--temperature", "3"]
    out, _ = run(*sampled, "--seed", "1")
    assert run(*sampled, "--seed", "1")[0] == out != run(*sampled, "--seed", "2")[0]


MISTAKES = [
    (["--prompt", "<image> a <image>", "--image", "0.png"], "--prompt has 2 <image>, 1 --image came: expected as many"),
    (["--prompt", "<image>"], "--prompt has 1 <image>, 0 --image came"),
    (["--prompt", "a", "--image", "nowhere.png"], "nowhere.png: expected a picture file, there is none"),
    (["--prompt", "a", "--image", "words.png"], "words.png"),
    (["--prompt", "a", "--seed", "1"], "--seed 1 does nothing without --temperature"),
    (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: expected"),
    (["--prompt", "a", "--temperature", "0"], "temperature: expected"),
    (["--prompt", "a", "--temperature", "1", "--num-beams", "2"], "sampling with beams does not exist here"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_of_generate(run: Run, arguments: list[str], message: str) -> None:
    out, err = run("generate", *arguments, code=2)
    assert not out
    assert err.startswith("flax-vlm: ") and message in err
    assert "Traceback" not in err and len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    ("command", "model", "message"),
    [
        ("generate", str(ALTCLIP), "holds a AltCLIPModel, which does not generate text"),
        ("chat", str(ALTCLIP), "holds a AltCLIPModel, which does not generate text"),
        ("chat", "base", "expected the tokens ['<end_of_utterance>'], which this prompt needs"),
        ("chat", "bare", "bare: expected the files of a tokenizer beside the weights"),
        ("chat", "nowhere", "nowhere"),
    ],
    ids=["generate with AltCLIP", "chat with AltCLIP", "no chats", "no tokenizer", "no folder"],
)
def test_models_that_cannot(run: Run, command: str, model: str, message: str) -> None:
    prompt = ["--prompt", "a"] if command == "generate" else []
    out, err = run(command, *prompt, model=model, lines="one\n", code=2)
    assert not out
    assert message in err and len(err.splitlines()) == 1


def said(*turns: Any) -> list[dict[str, Any]]:
    """A chat: what a person says, with its pictures, and what the model does, by turns."""
    messages: list[dict[str, Any]] = []
    for i, (text, *pictures) in enumerate([turn] if isinstance(turn, str) else turn for turn in turns):
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


def replies(vlm: Any, *turns: Any) -> str:
    """What a chat prints, where each turn reads all that was said before."""
    turns_and_answers: list[Any] = []
    for turn in turns:
        turns_and_answers.append(turn)
        turns_and_answers.append(ask(vlm, said(*turns_and_answers)))
    return "".join(f"{answer}\n" for answer in turns_and_answers[1::2])


def test_chat(run: Run, vlm: Any) -> None:
    out, err = run("chat", lines="mouse\n   \n\ndog\n/image 0.png\nred\nblue\n/image 1.png\nblue\n/quit\nmouse\n")
    assert out == replies(vlm, "mouse", "dog", ["red", Path("0.png")], "blue", ["blue", Path("1.png")])
    assert err == "/image PATH adds a picture to what you say next, /quit ends\n"


def test_chat_samples(run: Run) -> None:
    def sampled(*options: str) -> str:
        return run("chat", "--temperature", "3", *options, lines="mouse\nmouse\n")[0]

    assert sampled("--seed", "1") == sampled("--seed", "1") != sampled("--seed", "2")
    _, err = run("chat", "--seed", "1", lines="mouse\n", code=2)
    assert "seed does nothing without do_sample=True" in err


def test_chat_goes_on_after_mistakes(run: Run, vlm: Any) -> None:
    lines = "/image nowhere.png\n/image words.png\n/image\n/imag 0.png\nis this <image>?\nmouse\n"
    out, err = run("chat", lines=lines)
    assert out == replies(vlm, "mouse")
    said_of = err.splitlines()[1:]
    for line, what in zip(
        said_of, ("nowhere.png", "words.png", "/image: ", "/imag 0.png: ", "<image> in"), strict=True
    ):
        assert what in line


def test_ctrl_c_stops_the_answer(run: Run, vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, pieces = generation.Stream.__next__, []

    def interrupted(self: generation.Stream) -> Any:
        if len(pieces) == 1:
            pieces.append("")
            raise KeyboardInterrupt
        pieces.append(go_on(self))
        return pieces[-1]

    monkeypatch.setattr(generation.Stream, "__next__", interrupted)
    out, _ = run("chat", lines="mouse\ndog\n")
    first, second = out.splitlines()
    assert replies(vlm, "mouse").startswith(first) and len(replies(vlm, "mouse")) > len(first) + 1
    assert second == ask(vlm, said("mouse", first, "dog"))
