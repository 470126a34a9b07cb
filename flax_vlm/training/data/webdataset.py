"""Samples of a webdataset tar, as records.

The files of a sample follow each other and share a name up to its first dot. Pictures become "image", or "images" where
there are several; .txt is the text, .cls the label, .json holds further fields. Where "images" of the .json lists
endings ("0.jpg") between nulls, these are replaced by the pictures: so a tar holds documents.
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from flax_vlm.training.data.records import Record

_PICTURES = {"bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"}


def is_tar(path: Path) -> bool:
    """By its name: .tar, .tar.gz, .tgz and the like."""
    return path.suffix in (".tar", ".tgz") or path.suffixes[-2:-1] == [".tar"]


def samples(tar: Path) -> Iterator[Record]:
    """The samples of a tar, which may be compressed, read once from its start to its end."""
    try:
        with tarfile.open(tar) as archive:
            members = (member for member in archive if member.isfile())
            for key, files in groupby(members, lambda member: _split(member)[0]):
                contents = {_split(each)[1]: _content(archive, each) for each in files}
                try:
                    yield _record(contents)
                except ValueError as error:
                    raise ValueError(f"sample {key}: {error}") from error
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"{tar}: {error}") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None  # which it is of folders and the like
    return content.read()


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """photos/17.left.jpg -> photos/17, left.jpg"""
    path = PurePosixPath(member.name)
    stem, _, ending = path.name.partition(".")
    return str(path.with_name(stem or path.name)), ending.lower()


def _record(files: dict[str, bytes]) -> Record:
    pictures = {ending: files.pop(ending) for ending in list(files) if ending.rpartition(".")[2] in _PICTURES}
    record = json.loads(files.pop("json", "{}"))
    if not isinstance(record, dict):
        raise ValueError(f"expected an object as its .json, got {type(record).__name__}")
    if "txt" in files:
        record["text"] = files.pop("txt").decode()
    if "cls" in files:
        record["label"] = int(files.pop("cls"))
    if isinstance(record.get("images"), list):
        missing = [name for name in record["images"] if name is not None and name not in pictures]
        if missing:
            raise ValueError(f"its .json names the pictures {missing}: expected some of {sorted(pictures)}")
        record["images"] = [None if name is None else pictures[name] for name in record["images"]]
    elif len(pictures) == 1:
        record["image"] = next(iter(pictures.values()))
    elif pictures:
        record["images"] = list(pictures.values())
    return record | files
