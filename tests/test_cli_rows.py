"""flax-vlm generate --dataset and embed, as a person types them, on the two small models of the examples."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import cli
from flax_vlm.inference.row_file import journal_of
from flax_vlm.training.data.records import read, write
from tests.compiling import FAST
from tests.parallel.processes import free_address, run
from tests.tolerances import FLOAT32, assert_close

ROOT = Path(__file__).parent.parent
READS, TALKS = (str(ROOT / "examples" / name / "checkpoint") for name in ("altclip-digits", "idefics-digits"))
DIGITS, ROWS = 21, 12
Says = Callable[..., tuple[str, str]]


def question(number: int) -> dict[str, Any]:
    """One or three pictures, and what is asked has different lengths."""
    words = ["The digits are", "What is this? It is", "The digit is"][number % 3]
    shown = [f"{(number + place) % DIGITS}.png" for place in range(1 if number % 3 else 3)]
    return {"id": f"q{number}", "images": shown, "question": f" {words}", "answer": "?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, one of them torn, and records of what is asked about them."""
    folder = tmp_path_factory.mktemp("rows")
    with np.load(ROOT / "examples" / "altclip-digits" / "heldout.npz") as held_out:
        for number, image in enumerate(held_out["images"][:DIGITS]):
            Image.fromarray(image).save(folder / f"{number}.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:90])

    def save(name: str, records: list[Any]) -> None:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        (folder / name).write_text("\n".join(lines) + "\n")

    save("mixed.jsonl", [question(number) for number in range(DIGITS)])
    save("single.jsonl", [{"image": f"{i}.png", "question": question(1 + i % 2)["question"]} for i in range(ROWS)])
    texts = [{"image": f"{i}.png", "text": "zwei " * (1 + 5 * (i % 2))} for i in range(4)]
    save("bad.jsonl", [*texts[:2], '{"image": ', "", {"image": "torn.png", "text": 3}, *texts[2:]])
    return folder


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Standard output and standard error of a command."""

    def says(*arguments: Any, code: int = 0) -> tuple[str, str]:
        done = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert done == code, captured.err
        return captured.out, captured.err

    return says


def test_answers_are_those_of_one_row_alone_and_come_again(folder: Path, tmp_path: Path) -> None:
    (out,) = run("../answers_of_rows.py", [TALKS, folder / "single.jsonl", tmp_path])
    assert f"greedy.jsonl: {ROWS} rows; {ROWS} new ones in " in out
    assert f"again.jsonl: {ROWS} rows; {ROWS - 8} new ones in " in out
    found = [json.loads(line) for line in (tmp_path / "greedy.jsonl").read_text("utf-8").splitlines()]
    records = [json.loads(line) for line in (folder / "single.jsonl").read_text().splitlines()]
    assert [line["index"] for line in found] == list(range(ROWS))
    assert [line["record"] for line in found] == [{"question": record["question"]} for record in records]
    assert {line["finish_reason"] for line in found} == {"stop"}, "a word and a full stop"


def test_vectors_of_records_and_bad_ones_at_their_places(folder: Path, tmp_path: Path, says: Says) -> None:
    vlm: Any = flax_vlm.from_pretrained(READS)
    data, options = folder / "bad.jsonl", ["--model", READS, "--batch-size", 2, "--dataset"]
    good = [0, 1, 4, 5]
    for field, features, inputs in (
        ("image", vlm.get_image_features, lambda items: vlm.processor(images=items)),
        ("text", vlm.get_text_features, lambda items: vlm.processor(text=items, pad_to_multiple_of=16)),
    ):
        out, err = says("embed", tmp_path / field, *options, data, "--field", field)
        assert "6 rows, 2 of them bad; 6 new ones" in out
        torn, wrong = sorted(err.splitlines())
        assert f"put aside: {data}, line 3: JSONDecodeError" in torn
        expected = "expected a text as 'text' of a record, came int" if field == "text" else "Error: "
        assert f"put aside: {data}, line 5: " in wrong and expected in wrong
        found = np.load(tmp_path / f"{field}.npy")
        assert found.dtype == np.float32 and np.flatnonzero(np.isnan(found).all(1)).tolist() == [2, 3]
        vectors = features(**inputs([read(data)[row][field] for row in good]))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        assert_close(found[good], vectors, FLOAT32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.npy", "text.npy"]


def test_too_many_bad_ones_end_it_and_nothing_is_lost(folder: Path, tmp_path: Path, says: Says) -> None:
    command = ["embed", tmp_path / "v.npy", "--model", READS, "--dataset", folder / "bad.jsonl", "--batch-size", 2]
    _, err = says(*command, "--max-bad", 0, code=2)
    assert "--max-bad 0: expected at most so many bad ones of 6 rows, came across 2, the last" in err
    assert "line 3: JSONDecodeError: Expecting value: line 1 column 10" in err and not (tmp_path / "v.npy").exists()
    _, err = says(*command, "--max-bad", 0, code=2)
    assert "came across 2, in earlier runs. What is done is kept: a larger --max-bad goes on" in err
    out, _ = says(*command, "--max-bad", 2)
    assert "6 rows, 2 of them bad; " in out and "; 6 new" not in out
    images = tmp_path / "none"
    images.mkdir()
    (images / "torn.png").write_bytes((folder / "torn.png").read_bytes())
    _, err = says("embed", tmp_path / "w", "--model", READS, "--images", images, code=2)
    assert f"came across 1, the last {images / 'torn.png'}: " in err, "there is no good one"


def test_mistakes_are_told_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flax_vlm.pretrained.from_pretrained", None)
    data, output = folder / "single.jsonl", tmp_path / "o.jsonl"
    several = ["generate", TALKS, "--dataset", data, "--output", output]
    both = "expected --prompt for one answer or --dataset for many"
    idle = "do nothing without --dataset"
    output.write_text("there\n")
    for arguments, message in (
        ([*several, "--prompt", "a"], both),
        (["generate", TALKS], both),
        (several[:-2], "--dataset: expected --output, the .jsonl to write"),
        ([*several, "--image", folder / "0.png"], "and no --image"),
        ([*several, "--seed", 3], "--seed 3 does nothing without --temperature"),
        (["generate", TALKS, "--prompt", "a", "--output", output], idle),
        (["generate", TALKS, "--prompt", "a", "--batch-size", 4], idle),
        ([*several, "--batch-size", 0], "--batch-size 0, --max-bad 100, --tensor 1: expected numbers above 0"),
        ([*several, "--dataset", tmp_path / "none.jsonl"], "expected a file of records"),
        (several, f"{output} exists: choose another output, or pass --overwrite"),
        (["embed", "v", "--model", READS], "expected --images, --texts or --dataset: pass one of them"),
        (["embed", "v", "--model", READS, "--dataset", data, "--texts", data], "pass one of them"),
        (["embed", "v", "--model", READS, "--texts", data, "--field", "text"], "does nothing without --dataset"),
        (["embed", "v", "--model", READS, "--images", tmp_path / "no.png"], "expected a picture file, there is none"),
    ):
        _, err = says(*arguments, code=2)
        assert message in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"] and output.read_text() == "there\n"


class Command:
    """`flax-vlm generate` of the mixed questions in processes of its own; a program is compiled once for all."""

    def __init__(self, folder: Path, output: Path, cache: Path, *options: Any) -> None:
        fixed = ["--dataset", folder / "mixed.jsonl", "--output", output, "--template", "{}", "--max-new-tokens", 8]
        self.arguments = list(map(str, ["generate", TALKS, *fixed, *options]))
        self._output = output
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FAST,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self) -> subprocess.Popen[str]:
        code = "import sys; from flax_vlm.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *self.arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment
        )

    def whole(self) -> bytes:
        process = self.start()
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return self._output.read_bytes()

    def killed(self, lines: int, delay: float) -> bool:
        """Whether it was killed, so long after its journal had so many lines."""
        process, journal = self.start(), journal_of(self._output, 0)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                time.sleep(delay)
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
        return process.returncode < 0


@pytest.mark.slow
def test_killed_again_and_again(folder: Path, tmp_path: Path) -> None:
    how = ["--temperature", 3, "--seed", 1, "--batch-size", 2]
    expected = Command(folder, tmp_path / "whole.jsonl", tmp_path / "cache", *how).whole()
    assert [json.loads(line)["index"] for line in expected.splitlines()] == list(range(DIGITS))
    rng, killed = random.Random(0), 0
    for round_ in range(3):
        command = Command(folder, tmp_path / f"{round_}.jsonl", tmp_path / "cache", *how)
        for lines in (1, *sorted(rng.sample(range(2, DIGITS + 1), 4))):
            killed += command.killed(lines, rng.random() * 0.2)
            output = tmp_path / f"{round_}.jsonl"
            if output.exists():
                break
        output = tmp_path / f"{round_}.jsonl"
        assert (output.read_bytes() if output.exists() else command.whole()) == expected
    assert killed >= 6


@pytest.mark.slow
def test_batches_processes_and_files_change_no_answer(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = Command(folder, tmp_path / "a.jsonl", cache, "--batch-size", 8).whole()
    answers = [json.loads(line)["answer"] for line in whole.splitlines()]
    assert Command(folder, tmp_path / "b.jsonl", cache, "--batch-size", 3).whole() == whole
    drawn = [Command(folder, tmp_path / f"{n}.jsonl", cache, "--batch-size", n, "--temperature", 3) for n in (8, 3)]
    assert drawn[0].whole() == drawn[1].whole() != whole

    address = free_address()
    together = Command(folder, tmp_path / "c.jsonl", cache, "--batch-size", 4, "--distributed")
    run("../process_of_rows.py", *([address, 2, process, 1, *together.arguments] for process in range(2)))
    assert (tmp_path / "c.jsonl").read_bytes() == whole
    spread = Command(folder, tmp_path / "e.jsonl", cache, "--batch-size", 4, "--tensor", 2)
    run("../process_of_rows.py", ["-", 1, 0, 4, *spread.arguments])
    assert (tmp_path / "e.jsonl").read_bytes() == whole

    vlm: Any = flax_vlm.from_pretrained(TALKS)
    for number in range(6):
        images = [folder / name for name in question(number)["images"]]
        inputs = vlm.processor([*images, question(number)["question"]])
        alone = vlm.generate(**inputs, max_new_tokens=8).sequences[0, inputs["input_ids"].shape[1] :]
        assert answers[number] == vlm.processor.decode(alone)

    records = ((read(folder / "mixed.jsonl"))[number] for number in range(6))
    assert write(records, tmp_path / "q.array_record") == 6
    command = Command(folder, tmp_path / "d.jsonl", cache, "--batch-size", 3)
    command.arguments[command.arguments.index("--dataset") + 1] = str(tmp_path / "q.array_record")
    assert command.whole().splitlines() == whole.splitlines()[:6]
