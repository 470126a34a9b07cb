"""Small things in place of large ones, so that what a document says can be run: models, pictures, data sets, TPUs.

A document names released checkpoints, and files that a reader would have. Here each of these has a stand-in of a few
kilobytes; a new name in a document needs one here.
"""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flax_vlm import convert
from tests.markdown import ROOT
from tests.parity import altclip_cases, idefics_cases
from tests.talkers import END, FAKE, GLM4V, IMAGE, tiny_glm4v, tiny_idefics

EXAMPLES = ROOT / "examples"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PICTURES = {"digit.png": 3, "other.png": 8, "cat.jpg": 4, "dog.jpg": 7}  # and what they show
# What `flax-vlm plan` calls a model, and a tiny one of that family.
PLANNED = {
    "altclip": altclip_cases.WHOLE,
    "idefics-9b": idefics_cases.RESAMPLED,
    "idefics-80b": idefics_cases.RESAMPLED,
    "glm-4v-9b": GLM4V,
}
# One device instead of a pod, and rows that it computes at once.
SIZES = {"--topology": "v5e:1x1", "--data": "1", "--fsdp": "1", "--batch": "4", "--seq": "8", "--images": "1"}
# A run of two steps; what a model of two layers needs no room for is left out.
RUN = {"--steps": "2", "--batch-size": "4", "--accumulate": "2", "--data.max-length": "64", "--log-every": "1"}
RUN |= {"--checkpoint-every": "2", "--sample-every": "2", "--remat": "none", "--optimizer.warmup-steps": "0"}


class Models:
    """The checkpoints, in PyTorch's layout; `native` has an instruct model as `flax-vlm train` leaves it."""

    def __init__(self, folder: Path) -> None:
        made = {"instruct": tiny_idefics([FAKE, IMAGE, END]), "glm4v": tiny_glm4v()}
        for name, vlm in made.items():
            vlm.save_pretrained(folder / "native" / name)
            convert.to_torch(folder / "native" / name, folder / name)
        self.native = folder / "native" / "instruct"
        self._names: Mapping[str, Path] = {
            "BAAI/AltCLIP": EXAMPLES / "altclip-digits" / "checkpoint",
            "HuggingFaceM4/idefics-9b-instruct": folder / "instruct",
            "HuggingFaceM4/idefics-9b": EXAMPLES / "idefics-digits" / "checkpoint",
            "THUDM/glm-4v-9b": folder / "glm4v",
        }

    def named_in(self, text: str) -> str:
        """The text with the folders of stand-ins where names of released checkpoints are."""
        return re.sub("|".join(map(re.escape, self._names)), lambda name: str(self._names[name[0]]), text)


def fill(folder: Path) -> None:
    """Files as a reader of the documents would have them in the folder where he works."""
    for name in ("examples", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    with np.load(EXAMPLES / "altclip-digits" / "heldout.npz") as held_out:
        images, labels = held_out["images"], held_out["labels"]
    first = [Image.fromarray(images[np.flatnonzero(labels == digit)[0]]) for digit in range(10)]
    for name, digit in PICTURES.items():
        first[digit].save(folder / name, quality=95)
    (folder / "photos").mkdir()
    for digit in range(3):
        first[digit].save(folder / "photos" / f"{digit}.png")
    with tarfile.open(folder / "photos-0.tar", "w") as tar:
        for digit in range(3):
            picture = io.BytesIO()
            first[digit].save(picture, "png")
            for name, content in (("png", picture.getvalue()), ("txt", WORDS[digit].encode())):
                member = tarfile.TarInfo(f"{digit}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shown = [(str(folder / name), WORDS[digit]) for name, digit in PICTURES.items()]
    asked: dict[str, Any] = {"question": " The digit is"}
    _save(folder / "in.jsonl", [asked | {"image": picture} for picture, _ in shown])
    _save(folder / "questions.jsonl", [asked | {"image": picture, "answers": [word] * 10} for picture, word in shown])
    _save(folder / "pairs.jsonl", [{"image": picture, "text": f"a {word}"} for picture, word in shown])
    _save(folder / "labels.jsonl", [{"image": picture, "label": word} for picture, word in shown])
    _save(folder / "talks" / "some.jsonl", [{"messages": _talk(picture, word)} for picture, word in shown])
    read = [{"images": [picture, None], "texts": [None, f" a {word}"]} for picture, word in shown]
    _save(folder / "documents" / "some.jsonl", read)


def trained(models: Models, words: list[str], folder: Path) -> None:
    """What a run would leave in the folder that its command names."""
    shutil.copytree(models.native, folder / words[words.index("--output") + 1] / "model")


def planned(words: list[str], folder: Path) -> list[str]:
    """`flax-vlm plan`, for a tiny model of the family on one device."""
    config = PLANNED[words[2]].to_hf()
    (folder / words[2]).mkdir(exist_ok=True)
    (folder / words[2] / "config.json").write_text(json.dumps(config))
    return [*words[:2], str(folder / words[2]), *with_options(words[3:], SIZES), "--quick"]


def with_options(words: list[str], options: Mapping[str, str]) -> list[str]:
    """The words with these options, in place of the same ones."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        else:
            kept.append(word)
    return kept + [word for option in options.items() for word in option]


def _talk(picture: str, word: str) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": shown}, {"role": "assistant", "content": word}]


def _save(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
