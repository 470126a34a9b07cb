"""Loading as a person meets it: a bar, a line with the peak of memory, a copy that is converted once, eight bits."""

import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_vlm
from flax_vlm import checkpoint, convert, demo, parallel
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.layers.quantized import Quantized
from flax_vlm.whole_folder import whole_folder
from tests.convert.test_port import write_hf
from tests.parity import altclip_cases as cases
from tests.tolerances import FLOAT32_REORDERED, assert_close

EXAMPLES = Path(__file__).parents[1] / "examples"
TALKER, READER = EXAMPLES / "idefics-digits", EXAMPLES / "altclip-digits"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf")
    return tmp_path / "hf"


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first parameter takes longer than a person waits without a word."""
    place = parallel.place

    def place_slowly(*arguments: Any, tell: Any, **options: Any) -> Any:
        said = []

        def wait(name: str) -> None:
            if not said:
                time.sleep(0.7)
            said.append(name)
            tell(name)

        return place(*arguments, tell=wait, **options)

    monkeypatch.setattr(parallel, "place", place_slowly)


def test_a_bar_where_someone_looks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flax_vlm.from_pretrained(folder, progress=True)
    assert not capsys.readouterr().err, "nobody waited"
    slowly(monkeypatch)
    flax_vlm.from_pretrained(folder)
    assert not capsys.readouterr().err, "no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    flax_vlm.from_pretrained(folder, progress=False)
    assert not capsys.readouterr().err
    flax_vlm.from_pretrained(folder)
    shown = capsys.readouterr().err
    assert "hf: 100%" in shown and "peak memory" in shown


def test_a_line_tells_seconds_and_peak_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flax_vlm"):
        flax_vlm.from_pretrained(folder)
    (said,) = [record.getMessage() for record in caplog.records if "loaded in" in record.getMessage()]
    assert said.startswith("hf: 0.0 GB loaded in ")
    resident = float(said.split("peak memory ")[1].split(" GB")[0])
    assert 0.1 < resident < 100


def test_reading_and_placing_overlap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second parameter is read while the first is not yet there."""
    from flax_vlm.convert.torch_files import TorchFiles

    read, together = TorchFiles.read, threading.Barrier(2, timeout=20)
    turns = iter(range(2))

    def meet(*arguments: Any) -> Any:
        if next(turns, None) is not None:
            together.wait()
        return read(*arguments)

    monkeypatch.setattr(TorchFiles, "read", meet)
    flax_vlm.from_pretrained(folder)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made, to_flax = [], convert.to_flax

    def count(source: Any, target: Any, **options: Any) -> Any:
        moved = to_flax(source, target, **options)
        made.append(target)
        return moved

    monkeypatch.setattr(convert, "to_flax", count)
    return made


def test_a_copy_is_converted_once(
    folder: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    plain = flax_vlm.from_pretrained(folder)
    for _ in range(2):
        vlm = flax_vlm.from_pretrained(folder, cache_converted=True)
        jax.tree.map(np.testing.assert_array_equal, vlm.params, plain.params)
    (copy,) = conversions
    assert copy.parent == tmp_path / "home" / "flax_vlm" and copy.name.startswith("hf-")
    assert checkpoint.is_native(copy)
    flax_vlm.from_pretrained(copy, cache_converted=tmp_path / "elsewhere")
    assert len(conversions) == 1, "what is native needs none"
    flax_vlm.from_pretrained(folder, cache_converted=tmp_path / "elsewhere")
    assert conversions[1].parent == tmp_path / "elsewhere"
    (folder / "config.json").touch()
    flax_vlm.from_pretrained(folder, cache_converted=tmp_path / "elsewhere")
    assert len(set(conversions)) == 3, "files that have changed make another copy"


def test_who_comes_second_waits_for_the_copy(
    folder: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flax_vlm.copies.time.sleep", lambda _: threading.Event().wait(0.05))
    flax_vlm.from_pretrained(folder, cache_converted=tmp_path)
    (copy,) = conversions
    copy.rename(tmp_path / "made")
    with whole_folder(copy) as draft:  # someone else is at it
        waiting = threading.Thread(
            target=lambda: found.append(flax_vlm.from_pretrained(folder, cache_converted=tmp_path))
        )
        found: list[flax_vlm.VLM] = []
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        for file in (tmp_path / "made").iterdir():
            file.rename(draft.folder / file.name)
    waiting.join(60)
    assert len(found) == 1 and len(conversions) == 1


def test_what_stands_in_its_place_is_left_alone(folder: Path, tmp_path: Path, conversions: list[Path]) -> None:
    flax_vlm.from_pretrained(folder, cache_converted=tmp_path)
    (copy,) = conversions
    copy.rename(tmp_path / "made")
    copy.write_text("mine")
    with pytest.raises(FileExistsError):
        flax_vlm.from_pretrained(folder, cache_converted=tmp_path)
    assert copy.read_text() == "mine"


def bytes_of(vlm: flax_vlm.VLM) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vlm.params))


def test_eight_bits_say_the_same_in_half_the_memory() -> None:
    """Of the next tokens of right answers about held-out pictures, in four languages."""
    with np.load(TALKER / "heldout.npz") as file:
        images, labels = file["images"], file["labels"]
    questions = demo.make_questions(demo.read_speeches(TALKER), labels)[::24]
    said: dict[Any, np.ndarray] = {}
    held: dict[Any, int] = {}
    for quantize in (None, "int8"):
        vlm = flax_vlm.from_pretrained(TALKER / "checkpoint", dtype="bfloat16", quantize=quantize)
        texts = [[*question.items([images[i] for i in question.pictures]), question.answer] for question in questions]
        inputs = vlm.processor(texts)
        said[quantize] = np.asarray(vlm(**inputs).logits).argmax(-1)[inputs["attention_mask"] > 0]
        held[quantize] = bytes_of(vlm)
    assert said[None].size > 800
    assert (said["int8"] == said[None]).mean() >= 0.99
    assert held["int8"] <= 0.55 * held[None]


@pytest.mark.slow
def test_a_reader_in_eight_bits() -> None:
    with np.load(READER / "heldout.npz") as file:
        images = list(file["images"])
    texts = [f"handwritten digit {word}" for word in "zero one two three four five six seven eight nine".split()]
    found = {}
    for quantize in (None, "int8"):
        vlm = flax_vlm.from_pretrained(READER / "checkpoint", dtype="bfloat16", quantize=quantize)
        found[quantize] = np.asarray(vlm(**vlm.processor(text=texts, images=images)).logits_per_image).argmax(-1)
    assert (found["int8"] == found[None]).mean() >= 0.99


@pytest.mark.parametrize("scan_layers", [False, True])
def test_kernels_and_tables_are_in_eight_bits(scan_layers: bool, folder: Path) -> None:
    vlm = flax_vlm.from_pretrained(folder, quantize="int8", scan_layers=scan_layers)
    params = flatten_params(vlm.params)
    layer = "text_model/roberta/encoder/layers" + ("" if scan_layers else "_1")
    assert isinstance(params[f"{layer}/attention/self/query/kernel"], Quantized)
    assert isinstance(params["text_model/roberta/embeddings/word_embeddings/embedding"], Quantized)
    assert not isinstance(params["vision_model/embeddings/patch_embedding/kernel"], Quantized)
    inputs = cases.texts() | {"pixel_values": cases.images().astype(np.float32)}
    looped = flax_vlm.from_pretrained(folder, quantize="int8")
    assert_close(vlm(**inputs).logits_per_text, looped(**inputs).logits_per_text, FLOAT32_REORDERED)


def test_what_eight_bits_cannot_do_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantize='int3': expected 'int8' or None"):
        flax_vlm.from_pretrained(folder, quantize="int3")  # type: ignore[arg-type]  # a mistake
    vlm = flax_vlm.from_pretrained(folder, quantize="int8")
    with pytest.raises(ValueError, match="load without `quantize` what is to be saved"):
        vlm.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="load without `quantize`"):
        vlm.prune_heads({1: [0]})
    talker = flax_vlm.from_pretrained(TALKER / "checkpoint", quantize="int8")
    ids = jnp.full((1, 5), 7)
    with pytest.raises(ValueError, match="vocab_chunk is for training"):
        talker.model.apply({"params": talker.params}, ids, labels=ids, vocab_chunk=16)
