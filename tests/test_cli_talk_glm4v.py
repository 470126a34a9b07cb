"""flax-vlm generate and flax-vlm chat with a GLM-4V."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import flax_vlm
from flax_vlm import cli
from flax_vlm.cli import talk
from flax_vlm.generation import GenerationConfig
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.glm4v import GLM4VConfig, GLM4VForConditionalGeneration, GLM4VVisionConfig
from flax_vlm.pretrained import VLM
from flax_vlm.processing import GLM4VProcessor

TOKENIZER = Path(__file__).parent / "golden" / "glm4v" / "tokenizer"
PAD, USER, ASSISTANT, OBSERVATION, BEGIN, END, NEWLINE, HELLO = 400, 407, 408, 409, 410, 411, 10, 352
LIMIT = 8
CONFIG = GLM4VConfig(
    hidden_size=48,
    num_layers=1,
    num_attention_heads=4,
    kv_channels=12,
    ffn_hidden_size=40,
    padded_vocab_size=420,
    seq_length=256,
    eos_token_id=(PAD, USER, OBSERVATION),
    pad_token_id=PAD,
    boi_token_id=BEGIN,
    eoi_token_id=END,
    vision_config=GLM4VVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_heads=2,
        image_size=112,
        num_positions=65,
    ),
)
Run = Callable[..., tuple[str, str]]


def talkative(model: GLM4VForConditionalGeneration, processor: GLM4VProcessor) -> Any:
    """Random weights that say a line break, "hello", and words, which are read as they were written."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.1 * drawn if "scale" in str(path[-1]) else (1 if "embeddings" in str(path) else 0.2) * drawn

    params = jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract_params(model)))
    words = params["transformer"]["embedding"]["word_embeddings"]["embedding"]
    head = params["output_layer"]["kernel"]
    texts = [processor.tokenizer.decode(index) for index in range(400)]
    spoken = [index for index, text in enumerate(texts) if text[0] == " " and text[1:].isalpha() and text.isascii()]
    head[:, np.setdiff1d(np.arange(head.shape[1]), spoken)] = 0
    # Two channels of their own, which no layer reads or writes, say what follows these two.
    for channel, (before, after) in enumerate([(ASSISTANT, NEWLINE), (NEWLINE, HELLO)]):
        words[:, channel] = 0
        words[before, channel], head[channel, after] = 15, 4
    for name, layer in params["transformer"]["encoder"].items():
        if name.startswith("layers"):
            layer["input_layernorm"]["scale"][:2] = layer["post_attention_layernorm"]["scale"][:2] = 0
            layer["self_attention"]["dense"]["kernel"][:, :2] = layer["mlp"]["down_proj"]["kernel"][:, :2] = 0
    return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, the same with sampling as its default, and two pictures."""
    folder = tmp_path_factory.mktemp("talk")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    processor, model = GLM4VProcessor.from_dir(TOKENIZER), GLM4VForConditionalGeneration(CONFIG)
    params = talkative(model, processor)
    greedy = GenerationConfig(eos_token_id=CONFIG.eos_token_id, pad_token_id=PAD)
    sampling = replace(greedy, do_sample=True, temperature=0.8, top_p=0.8)
    for name, config in (("greedy", greedy), ("sampling", sampling)):
        VLM(model, params, processor, config).save_pretrained(folder / name)
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
    assert list(talk._answer(glm4v, iter(["\n", "A", "\n", "\ndog"]))) == ["", "A", "\n", "\ndog"]
    assert list(talk._answer(glm4v, iter(["A\n", "\ndog"]))) == ["A\n", "\ndog"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """For each answer: how many tokens the model has read for it, and how many pictures."""
    found = []
    generate = VLM.generate

    def recorded(self: VLM, **inputs: Any) -> Any:
        shape = np.shape(inputs.get("images"))
        found.append((inputs["input_ids"].shape[1], shape[1] if len(shape) == 5 else int(bool(shape))))
        return generate(self, **inputs)

    monkeypatch.setattr(VLM, "generate", recorded)
    return found


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


def test_chat_reads_what_is_new(run: Run, vlm: Any, reads: list[tuple[int, int]]) -> None:
    out, err = run("chat", lines="/image 0.png\nhello\nworld\n/image 1.png\nis\n")
    first = len("[gMASK] <sop> <|user|> \\n begin placeholder end hello <|assistant|>".split())
    assert reads == [(first, 1), (4, 0), (7, 1)]
    assert out == replies(vlm, ["hello", Path("0.png")], "world", ["is", Path("1.png")])
    assert len(err.splitlines()) == 1


def test_chat_goes_on_where_the_model_has_no_more_positions(run: Run, vlm: Any) -> None:
    out, err = run("chat", lines=f"hello\n{'a' * 300}\nworld\n")
    assert out == replies(vlm, "hello", "world")
    assert "seq_length" in err
