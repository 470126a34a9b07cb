"""Run by test_cli_rows.py in a process of its own, which compiles fast: `generate --dataset` of a small IDEFICS."""

import json
import sys
from pathlib import Path
from typing import Any

import flax_vlm
from flax_vlm import cli, inference
from flax_vlm.inference.row_file import journal_of

SHOWN = 3  # rows that are also asked alone


def main(model: str, data: Path, folder: Path) -> None:
    def generate(name: str, *options: str) -> bytes:
        output = folder / name
        fixed = ["--dataset", str(data), "--output", str(output), "--template", "{}", "--batch-size", "4"]
        assert cli.main(["generate", model, *fixed, "--max-new-tokens", "4", *options]) == 0
        return output.read_bytes()

    greedy = list(map(json.loads, generate("greedy.jsonl").splitlines()))
    vlm: Any = flax_vlm.from_pretrained(model)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    for line, record in zip(greedy[:SHOWN], records, strict=False):
        inputs = vlm.processor([data.parent / record["image"], record["question"]])
        alone = vlm.generate(**inputs, max_new_tokens=4).sequences[0, inputs["input_ids"].shape[1] :]
        assert line["answer"] == vlm.processor.decode(alone), line
        ended = alone[-1] in vlm.generation_config.stop_ids
        assert (line["tokens"], line["finish_reason"]) == (len(alone), "stop" if ended else "length")

    drawn = generate("drawn.jsonl", "--temperature", "3", "--seed", "5")
    note = inference.RowFile.note

    def interrupted(self: inference.RowFile, rows: Any) -> None:
        note(self, rows)
        if self.done.sum() >= 8:
            raise KeyboardInterrupt

    inference.RowFile.note = interrupted
    again = ["generate", model, "--dataset", str(data), "--output", str(folder / "again.jsonl"), "--template", "{}"]
    again += ["--batch-size", "4", "--max-new-tokens", "4", "--temperature", "3", "--seed", "5"]
    assert cli.main(again) == 130 and not (folder / "again.jsonl").exists()
    inference.RowFile.note = note
    assert len(journal_of(folder / "again.jsonl", 0).read_bytes().splitlines()) == 1 + 8 + 1
    assert cli.main(again) == 0
    assert (folder / "again.jsonl").read_bytes() == drawn
    assert generate("other.jsonl", "--temperature", "3", "--seed", "6") != drawn


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
