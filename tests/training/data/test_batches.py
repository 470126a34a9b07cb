"""Batches are a function of the seed and the step: whoever reads, and wherever a run begins again."""

import json
import logging
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import flax_vlm
from flax_vlm.training.data import Batches, DataConfig, make_batches
from tests.tolerances import FLOAT32_REORDERED, assert_close
from tests.training.data.conftest import ROOT, jsonl

ROWS = 6


@pytest.fixture
def of_pairs(altclip, pairs):
    def make(batch_size: int = ROWS, seed: int = 3, process_index: int = 0, process_count: int = 1, **options: Any):
        config = DataConfig((str(pairs),), "pairs", max_length=7, **options)
        processes = {"process_index": process_index, "process_count": process_count}
        return make_batches(config, altclip, "altclip", batch_size=batch_size, seed=seed, **processes)

    return make


@pytest.fixture
def of_documents(idefics, documents):
    def make(family: str = "idefics", processor: Any = idefics, batch_size: int = 4, **options: Any) -> Batches:
        options = {"max_length": 19, "max_images": 3, "packing": True} | options
        config = DataConfig((str(documents),), "documents", **options)
        return make_batches(config, processor, family, batch_size=batch_size, seed=5)

    return make


def take(batches: Batches, number: int) -> list[dict[str, np.ndarray]]:
    return list(islice(batches, number))


def assert_same(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def numbers(altclip, batches: list[dict[str, np.ndarray]]) -> list[int]:
    """Which records a batch is of: their pictures' gray."""
    processor = altclip.image_processor
    pixels = np.concatenate([batch["pixel_values"] for batch in batches])[:, 0, 0, 0]
    gray = (pixels * processor.image_std[0] + processor.image_mean[0]) * 255
    np.testing.assert_allclose(gray, gray.round(), atol=1e-3)
    return gray.round().astype(int).tolist()


def test_workers_change_nothing(of_documents) -> None:
    """In rows of several examples, with a damaged record among them, and from a state of other workers too."""
    expected = take(of_documents(), 7)
    for workers in (1, 2):
        batches = of_documents(workers=workers)
        assert_same(take(batches, 4), expected[:4])
        assert batches.skipped == 1
        state = json.loads(json.dumps(batches.get_state()))
        batches.close()
        alone = of_documents()
        alone.set_state(state)
        assert_same(take(alone, 3), expected[4:])


READER = """
import sys
from flax_vlm.processing import AltCLIPProcessor
from flax_vlm.training.data import DataConfig, make_batches

config = DataConfig((sys.argv[1],), "pairs", max_length=7, workers=2)
batches = make_batches(config, AltCLIPProcessor.from_dir(sys.argv[2]), "altclip", batch_size=2, seed=0)
next(batches)
print("reading", flush=True)
input()
"""


def test_workers_end_with_a_run_that_is_killed(pairs) -> None:
    arguments = [sys.executable, "-c", READER, str(pairs), str(ROOT / "examples" / "altclip-digits" / "checkpoint")]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.kill()
        process.communicate(timeout=30)  # to the end of what any of them could still write


@pytest.mark.parametrize("step", range(5))
def test_a_run_goes_on_where_it_was(of_documents, of_pairs, step) -> None:
    for make in (of_documents, of_pairs):
        batches = make()
        take(batches, step)
        state = json.loads(json.dumps(batches.get_state()))
        expected = take(batches, 4)
        anew = make()
        take(anew, 2)  # it has begun already, and forgets that
        anew.set_state(state)
        assert anew.get_state() == state
        assert_same(take(anew, 4), expected)
        assert anew.get_state() == batches.get_state()


def test_an_epoch_has_every_record_once_and_the_next_another_order(of_pairs, altclip) -> None:
    batches = of_pairs(batch_size=9)
    epochs = [numbers(altclip, take(batches, 2)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[n for n in range(19) if n != 5]] * 3
    assert len(set(map(tuple, epochs))) == 3
    assert numbers(altclip, take(of_pairs(batch_size=9, seed=4), 2)) != epochs[0]
    one, two = of_pairs(seed=1, shuffle_seed=3), of_pairs(seed=2, shuffle_seed=3)
    first, second = take(one, 3), take(two, 3)
    assert numbers(altclip, first) == numbers(altclip, second)
    texts = [np.concatenate([batch["input_ids"] for batch in each]) for each in (first, second)]
    assert (texts[0] != texts[1]).any()  # the seed draws other texts


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_records(of_pairs, altclip, count) -> None:
    """Each reads every n-th record of the order that one alone would read; the damaged one has its place in it."""
    alone = of_pairs(batch_size=1)
    order: dict[int, int] = {}
    while len(order) < 54:  # three epochs
        (number,) = numbers(altclip, take(alone, 1))
        order[alone.get_state()["position"] - 1] = number
    for index in range(count):
        share = of_pairs(batch_size=count, process_index=index, process_count=count)
        expected = [number for position, number in order.items() if position % count == index]
        assert numbers(altclip, take(share, len(expected))) == expected


def test_bad_records_are_told_and_counted_once(of_pairs, caplog) -> None:
    with caplog.at_level(logging.WARNING, "flax_vlm"):
        batches = of_pairs(max_bad=1)
        take(batches, 12)  # four epochs
    assert batches.skipped == 1 and batches.get_state()["bad"] == [5]
    (record,) = caplog.records
    assert "record 5 of data.paths is skipped: ValueError: expected a picture" in record.getMessage()
    with pytest.raises(ValueError, match=r"data\.max_bad: expected at most 0 bad ones of 19 records, came across 1, "):
        take(of_pairs(max_bad=0), 4)


def test_it_does_not_look_for_a_good_record_for_ever(altclip, tmp_path) -> None:
    file = jsonl(tmp_path / "bad.jsonl", [{"image": "none.png", "text": "x"}] * 3)
    config = DataConfig((str(file),), "pairs", max_length=7)
    with pytest.raises(ValueError, match=r"came across 3, the last at \d: FileNotFoundError"):
        next(make_batches(config, altclip, "altclip", batch_size=2, seed=0))


def test_shapes_are_few(of_pairs, of_documents, glm4v) -> None:
    """Of tokens one, of pictures powers of two and the limit; with several processes the limit alone."""
    (batch,) = take(of_pairs(), 1)
    assert {name: array.shape for name, array in batch.items()} == {
        "input_ids": (ROWS, 7),
        "attention_mask": (ROWS, 7),
        "pixel_values": (ROWS, 32, 32, 3),
    }
    for family, pictures, processor in (("idefics", "pixel_values", None), ("glm4v", "images", glm4v)):
        options = {} if processor is None else {"processor": processor, "max_length": 40}
        seen = set()
        for packing in (True, False):
            for batch in take(of_documents(family, **options, max_images=3, packing=packing), 12):
                length = options.get("max_length", 19)
                assert {batch[name].shape for name in ("input_ids", "attention_mask", "labels")} == {(4, length)}
                assert ("segment_ids" in batch) == packing
                assert ("image_attention_mask" in batch) == (family == "idefics")
                assert all(
                    array.dtype == (np.float32 if name == pictures else np.int32) for name, array in batch.items()
                )
                seen.add(batch[pictures].shape[1])
        assert seen <= {1, 2, 3} and len(seen) > 1
    for batch in take(of_documents(max_images=0), 3):
        assert batch.keys() == {"input_ids", "attention_mask", "labels", "segment_ids"}


def test_processes_have_one_shape(idefics, documents) -> None:
    config = DataConfig((str(documents),), "documents", max_length=19, max_images=5)
    batches = make_batches(config, idefics, "idefics", batch_size=4, seed=5, process_index=1, process_count=2)
    assert {batch["pixel_values"].shape[:2] for batch in take(batches, 12)} == {(2, 5)}


def test_everything_wrong_is_said_before(of_pairs, of_documents, altclip, pairs) -> None:
    with pytest.raises(ValueError, match=r"data\.workers is -1.*data\.max_bad is -2.*batch_size is 5: .* 2 processes"):
        of_pairs(batch_size=5, process_count=2, workers=-1, max_bad=-2)
    with pytest.raises(ValueError, match="family: expected one of altclip, idefics, glm4v, got 'clip'"):
        of_documents("clip")
    with pytest.raises(ValueError, match=r"data\.packing True: expected pairs, one a row, for AltCLIP"):
        of_pairs(packing=True)
    with pytest.raises(ValueError, match=r"data\.max_images is 3: expected 0 for a model of text"):
        of_documents("glm4v", SimpleNamespace(image_processor=None))
    with pytest.raises(ValueError, match=r"data\.format is 'triples'"):
        make_batches(DataConfig((str(pairs),), "triples", 7), altclip, "altclip", batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"data\.paths: .*expected a file of records"):
        make_batches(DataConfig((f"{pairs}.gone",), "pairs", 7), altclip, "altclip", batch_size=2, seed=0)


def test_other_records_are_another_run(of_pairs, of_documents, documents) -> None:
    packed = of_documents()
    take(packed, 1)
    picture = documents.parent / "11.png"
    kept = picture.read_bytes()
    picture.unlink()
    with pytest.raises(ValueError, match=r"data\.paths: record 11 was good when this run was saved: FileNotFoundError"):
        packed.set_state(packed.get_state())
    picture.write_bytes(kept)
    batches = of_pairs()
    with pytest.raises(ValueError, match=r"data\.paths: expected 18 records, as when this run was saved, found 19"):
        batches.set_state(batches.get_state() | {"records": 18})


def test_a_model_reads_a_packed_row_as_its_documents_alone(of_documents) -> None:
    """The arrays mean to the model what they should: with pictures of others in the row, and positions of its own."""
    vlm = flax_vlm.from_pretrained(ROOT / "examples" / "idefics-digits" / "checkpoint", scan_layers=True)
    logits_of = jax.jit(lambda params, batch: vlm.model.apply({"params": params}, **batch).logits)
    (packed,), (each,) = (take(of_documents(packing=packing, batch_size=12), 1) for packing in (True, False))
    each["segment_ids"] = each["attention_mask"]  # one program for both, of the same shapes
    assert {name: array.shape for name, array in each.items()} == {name: array.shape for name, array in packed.items()}
    rows = zip(each["input_ids"], each["attention_mask"] != 0, np.asarray(logits_of(vlm.params, each)), strict=True)
    alone = {tuple(ids[is_token]): logits[is_token] for ids, is_token, logits in rows}
    compared = 0
    logits = np.asarray(logits_of(vlm.params, packed))
    for ids, segments, found in zip(packed["input_ids"], packed["segment_ids"], logits, strict=True):
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            assert_close(found[own], alone[tuple(ids[own])], FLOAT32_REORDERED)
            compared += 1
    assert compared > len(packed["input_ids"])
