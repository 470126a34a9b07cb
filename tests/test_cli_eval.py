"""flax-vlm eval, as a person types it, on the two small models of the examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import cli, zero_shot

EXAMPLES = Path(__file__).parent.parent / "examples"
READS, TALKS = (str(EXAMPLES / name / "checkpoint") for name in ("altclip-digits", "idefics-digits"))
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out digits as files, and records of what to make of them."""
    folder = tmp_path_factory.mktemp("eval")
    with np.load(EXAMPLES / "altclip-digits" / "heldout.npz") as held_out:
        images, labels = held_out["images"][:HELD_OUT], held_out["labels"][:HELD_OUT].tolist()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")

    def write(name: str, **fields: Any) -> None:
        records = ({"image": f"{i}.png"} | {key: make(label) for key, make in fields.items()} for i, label in labels_of)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    labels_of = list(enumerate(labels))
    write("labels.jsonl", label=int)
    write("words.jsonl", label=WORDS.__getitem__)
    write("captions.jsonl", texts=lambda label: [f"the digit {WORDS[label]}", f"a handwritten {WORDS[label]}"])
    write("questions.jsonl", question=lambda _: "The digit is", answers=lambda label: [WORDS[label]] * 10)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_zero_shot_is_what_classify_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, template = str(folder / "labels.jsonl"), "a photo of a handwritten {}"
    options = ["--task", "zero-shot", "--batch-size", "8", "--labels", *WORDS, "--template", template]
    found = run(capsys, READS, data, *options)
    labels = [json.loads(line)["label"] for line in (folder / "labels.jsonl").read_text().splitlines()]
    pictures = [folder / f"{i}.png" for i in range(HELD_OUT)]
    odds = zero_shot.classify(flax_vlm.from_pretrained(READS), pictures, WORDS, template=template)
    assert found["accuracy@1"] == np.mean(odds.argmax(-1) == labels) > 0.9
    assert (found["task"], found["pictures"], found["labels"]) == ("zero-shot", HELD_OUT, 10)
    assert found["accuracy@5"] == 1

    assert cli.main(["eval", READS, str(folder / "words.jsonl"), "--task", "zero-shot", "--limit", "9"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (said["task"], said["pictures"]) == ("zero-shot", "9")
    assert said["accuracy@1"].endswith("%")
    assert float(said["seconds"]) > 0


def test_retrieval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, READS, str(folder / "captions.jsonl"), "--task", "retrieval", "--limit", "7")
    assert (found["pictures"], found["captions"]) == (7, 14)
    ways = [[found[f"{way}_recall@{k}"] for k in (1, 5, 10)] for way in ("text_to_image", "image_to_text")]
    assert all(way == sorted(way) and way[-1] == 1 for way in ways)
    assert ways[0][1] > 0.9


def test_questions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "questions.jsonl"
    options = ["--template", "{}", "--batch-size", str(HELD_OUT), "--max-new-tokens", "6"]
    exact = run(capsys, TALKS, str(data), "--task", "exact-match", *options)
    assert exact["questions"] == HELD_OUT
    assert exact["exact_match"] > 0.9
    vqa = run(capsys, TALKS, str(data), "--task", "vqa", *options)
    assert vqa["vqa_accuracy"] == exact["exact_match"], "ten people who all say the same"


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(folder / "labels.jsonl")

    def says(*arguments: str) -> str:
        assert cli.main(["eval", *arguments]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        return said

    assert "expected files of records behind the model" in says(READS, "--task", "retrieval")
    assert "expected a file of records" in says(READS, str(folder / "none.jsonl"), "--task", "retrieval")
    assert "holds a AltCLIPModel: expected zero-shot or retrieval" in says(READS, data, "--task", "vqa")
    assert "IdeficsForVisionText2Text: expected exact-match or vqa" in says(TALKS, data, "--task", "retrieval")
    assert "--labels are of --task zero-shot, came with vqa" in says(TALKS, data, "--task", "vqa", "--labels", "a", "b")
    assert "--template: expected one for questions" in says(TALKS, data, "--task", "vqa", "--template", "{}", "{}")
    assert "--template: expected none" in says(READS, data, "--task", "retrieval", "--template", "{}")
    assert "--batch-size 0, --limit None: expected" in says(READS, data, "--task", "retrieval", "--batch-size", "0")
    assert "expected 'texts' or 'text'" in says(READS, data, "--task", "retrieval")
