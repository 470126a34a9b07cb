"""Processors of the three families, small, and files of records to read with them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_vlm.processing import AltCLIPProcessor, GLM4VProcessor, IdeficsProcessor

ROOT = Path(__file__).parents[3]
SPECIAL = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")


def gray(level: int) -> bytes:
    """A picture file that its pixels tell from others."""
    file = io.BytesIO()
    Image.new("L", (5, 4), level).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def altclip() -> AltCLIPProcessor:
    return AltCLIPProcessor.from_dir(ROOT / "examples" / "altclip-digits" / "checkpoint")


@pytest.fixture(scope="session")
def glm4v() -> GLM4VProcessor:
    processor = GLM4VProcessor.from_dir(ROOT / "tests" / "golden" / "glm4v" / "tokenizer")
    processor.tokenizer.config["image_size"] = 14
    return processor


@pytest.fixture(scope="session")
def idefics() -> IdeficsProcessor:
    """That of the instruct models, over the words of the digits."""
    processor = IdeficsProcessor.from_dir(ROOT / "examples" / "idefics-digits" / "checkpoint")
    processor.tokenizer.backend.add_special_tokens([SPECIAL[-1]])
    processor.tokenizer.config["additional_special_tokens"] = list(SPECIAL)
    return processor


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """19 pictures, whose gray is their number, with two texts each; picture 5 is damaged."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(19):
        (folder / f"{number}.png").write_bytes(b"not a picture" if number == 5 else gray(number))
    lines = [{"image": f"{number}.png", "texts": [f"one {number}", f"two {number}"]} for number in range(19)]
    return jsonl(folder / "pairs.jsonl", lines)


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """13 documents of one to seven words and no to two pictures; picture 4 is damaged."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(13):
        (folder / f"{number}.png").write_bytes(b"not a picture" if number == 4 else gray(19 * number))
        images: list[str | None] = [f"{number}.png"] * (number % 3)
        texts = [" ".join(map(str, rng.integers(0, 9, 1 + number % 7)))]
        lines.append({"images": [*images, None], "texts": [None] * len(images) + texts})
    return jsonl(folder / "documents.jsonl", lines)


def jsonl(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return file
