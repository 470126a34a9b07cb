"""Files of records: the same whatever their kind, whole or not there."""

import io
import json
import pickle
import re
import tarfile
from datetime import datetime
from pathlib import Path

import pytest

from flax_vlm.cli import main
from flax_vlm.training.data.records import read, write

RECORDS = [
    {"image": "a.png", "text": "größe", "n": 3},
    {"images": ["b.png", None], "texts": [None, "x"]},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "c.png"}, {"type": "text", "text": "?"}]}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    (tmp_path / "r.jsonl").write_text("\n".join([*lines[:2], "", lines[2]]), "utf-8")  # a blank line, no last newline
    return tmp_path


def with_bytes(value):
    """The records as ArrayRecord holds them."""
    if isinstance(value, dict):
        return {key: with_bytes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_bytes(each) for each in value]
    return value[0].encode() if str(value).endswith(".png") else value


def test_every_kind_holds_the_same(folder: Path) -> None:
    from pyarrow import Table, parquet

    lines = read(folder / "r.jsonl")
    assert lines[0] == {"image": folder / "a.png", "text": "größe", "n": 3}
    assert lines[1]["images"] == [folder / "b.png", None]
    assert lines[2]["messages"][0]["content"][0]["image"] == folder / "c.png"
    assert write(lines, folder / "r.array_record") == 3
    assert list(read(folder / "r.array_record")) == with_bytes(RECORDS)

    rows = [{"image": {"bytes": b"a", "path": None}}, {"image": {"bytes": None, "path": "b.png"}}, {"image": None}] * 3
    parquet.write_table(Table.from_pylist(rows), folder / "r.parquet", row_group_size=2)
    assert [row["image"] for row in read(folder / "r.parquet")] == [b"a", folder / "b.png", None] * 3


def test_files_follow_each_other(folder: Path) -> None:
    (folder / "more").mkdir()
    for number in (2, 1):
        (folder / "more" / f"{number}.jsonl").write_text(f'{{"n": {number}, "image": "p"}}\n')
    records = pickle.loads(pickle.dumps(read([f"{folder}/r.jsonl", f"{folder}/more/*.jsonl"])))
    assert [record.get("n") for record in records] == [3, None, None, 1, 2]
    assert records[4]["image"] == folder / "more" / "p"  # each from its own folder
    for index in (-1, 5):
        with pytest.raises(IndexError, match="expected one of 0 to 4"):
            records[index]


def test_what_cannot_be_read(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="or a pattern"):
        read(folder / "*.parquet")
    with pytest.raises(ValueError, match=r"a\.png: expected \.array_record.*flax-vlm records"):
        read([folder / "r.jsonl", folder / "a.png"])
    (folder / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="expected records, found none"):
        read(folder / "empty.jsonl")
    (folder / "list.jsonl").write_text("[1]\n{")
    with pytest.raises(ValueError, match=r"record 0 of .*list\.jsonl: expected a dict, got list"):
        read(folder / "list.jsonl")[0]
    with pytest.raises(ValueError, match="Expecting property name"):
        read(folder / "list.jsonl")[1]


def test_until_it_is_whole_there_is_no_target(folder: Path) -> None:
    (folder / "b.png").unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        write(read(folder / "r.jsonl"), folder / "r.array_record")
    with pytest.raises(ValueError, match=r"record 1: expected numbers, texts and bytes: .*datetime"):
        write([{"n": 1}, {"when": datetime.now()}], folder / "r.array_record")
    assert sorted(folder.iterdir()) == before


def tar(file: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def test_tars_become_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tar(
        folder / "1.tar",
        {
            "x/1.jpg": b"p",
            "x/1.txt": "größe".encode(),
            "x/1.json": b'{"url": "u"}',
            "y/1.PNG": b"q",
            "y/1.cls": b"7\n",
        },
    )
    second = tar(
        folder / "2.tar.gz",
        {
            "2.0.jpg": b"r",
            "2.1.jpg": b"s",
            "2.json": b'{"images": ["1.jpg", null, "0.jpg"], "texts": [null, "t", null]}',
            "3.0.jpg": b"u",
            "3.1.jpg": b"v",
            "3.pose": b"w",
        },
    )
    target = folder / "all.array_record"
    assert main(["records", str(first), str(second), str(folder / "r.jsonl"), str(target)]) == 0
    assert "7 records" in capsys.readouterr().out
    assert list(read(target)) == [
        {"image": b"p", "text": "größe", "url": "u"},
        {"image": b"q", "label": 7},
        {"images": [b"s", None, b"r"], "texts": [None, "t", None]},
        {"images": [b"u", b"v"], "pose": b"w"},
        *with_bytes(RECORDS),
    ]
    assert main(["records", str(first), str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["records", "--quiet", "--overwrite", str(first), str(target)]) == 0
    assert len(read(target)) == 2 and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("contents", "error"),
    [
        ({"1.json": b'{"images": ["2.jpg"]}', "1.3.jpg": b""}, r"sample 1: its \.json names the pictures \['2\.jpg'\]"),
        ({"1.json": b"[]"}, r"expected an object as its \.json, got list"),
        ({"1.cls": b"dog"}, r"sample 1: .*dog"),
        ({}, r"bad\.tar: "),
    ],
)
def test_bad_tars(contents: dict[str, bytes], error: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(folder / "bad.tar", contents)
    if not contents:
        (folder / "bad.tar").write_bytes(b"x" * 600)
    before = sorted(folder.iterdir())
    assert main(["records", str(folder / "bad.tar"), str(folder / "t.array_record")]) == 2
    assert re.search(error, capsys.readouterr().err)
    assert sorted(folder.iterdir()) == before


def test_records_asks_for_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["a.array_record"], ["a.tar", "b.tar"]):
        assert main(["records", *arguments]) == 2
        assert "expected what to read and then the .array_record to write" in capsys.readouterr().err
