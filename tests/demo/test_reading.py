"""The AltCLIP from end to end: the committed PyTorch checkpoint is converted, and reads pictures it has never seen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import convert, demo
from flax_vlm.demo import contact_sheet
from tests.tolerances import FLOAT32, assert_close

EXAMPLE = Path(__file__).parents[2] / "examples" / "altclip-digits"
CHECKPOINT = EXAMPLE / "checkpoint"
LANGUAGES = demo.read_languages(EXAMPLE)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    native = tmp_path_factory.mktemp("demo") / "native"
    convert.to_flax(CHECKPOINT, native)
    return flax_vlm.from_pretrained(native)


@pytest.fixture(scope="module")
def reading(vlm):
    return demo.read_held_out(vlm, EXAMPLE)


def test_reads_held_out_digits_in_every_language(reading):
    assert reading.images.shape == (360, 8, 8)
    np.testing.assert_allclose(reading.probabilities.sum(-1), 1, rtol=1e-5)
    found = dict(zip([language.language for language in LANGUAGES], reading.accuracy.tolist(), strict=True))
    assert len(found) == 6
    assert min(found.values()) >= 0.95, found


def test_the_model_card_reports_what_is_measured(reading):
    card = (CHECKPOINT / "README.md").read_text("utf-8")
    for language, accuracy, right in zip(LANGUAGES, reading.accuracy, reading.right.sum(0), strict=True):
        row = f"| {language.language} | {language.prompt(demo.EXAMPLE_WORD)} | {accuracy:.1%} | {right} of 360 |"
        assert row in card, "run examples/altclip-digits/evaluate.py --write-card"


def test_hardest_are_the_least_certain():
    certainty = np.array([0.9, 0.2, 0.99, 0.05])
    probabilities = np.zeros((4, 1, 10))
    probabilities[:, 0, 3], probabilities[:, 0, 8] = certainty, 1 - certainty
    reading = demo.Reading(LANGUAGES[:1], np.zeros((4, 8, 8), np.uint8), np.full(4, 3), probabilities)
    assert reading.hardest(3) == [3, 1, 0]
    assert reading.right[:, 0].tolist() == [True, False, True, False] and reading.accuracy == 0.5


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.code)
def test_sentences_and_fonts(language, vlm):
    assert language.zero_shot not in language.templates, "the evaluation's sentence is not for training"
    assert len({names[0] for names in language.words}) == 10
    captions = [template.format(names[0]) for template in language.templates for names in language.words]
    unknown = vlm.processor.tokenizer.unk_token_id
    assert not (vlm.processor(text=captions)["input_ids"] == unknown).any()
    for bold in (False, True):
        font = contact_sheet.load_font(EXAMPLE / "fonts", language.code, bold, 40)
        missing = bytes(font.getmask("\uffff"))
        shown = set(language.native + "".join(map(language.prompt, range(10)))) - {" "}
        assert not [character for character in shown if bytes(font.getmask(character)) == missing]


def test_held_out_pictures_are_not_trained_on():
    pytest.importorskip("sklearn")
    from examples import pictures

    training, held_out = pictures.load()
    with np.load(EXAMPLE / "heldout.npz") as file:
        np.testing.assert_array_equal(file["images"], held_out.images)
        np.testing.assert_array_equal(file["labels"], held_out.labels)
    assert len(training.labels) + len(held_out.labels) == 1797
    assert not {image.tobytes() for image in training.images} & {image.tobytes() for image in held_out.images}


@pytest.mark.torch
@pytest.mark.usefixtures("silent_transformers")
def test_transformers_reads_the_same(vlm):
    import torch
    import transformers

    model, info = transformers.AltCLIPModel.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(CHECKPOINT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    texts = [language.prompt(digit) for language in LANGUAGES for digit in range(10)]
    with np.load(EXAMPLE / "heldout.npz") as file:
        images = [Image.fromarray(image) for image in file["images"][:60]]
    ours = vlm.processor(texts, images)
    theirs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["input_ids"], tokenizer(texts, padding=True)["input_ids"])
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"].permute(0, 2, 3, 1))
    with torch.no_grad():
        expected = model(**theirs).logits_per_image
    assert_close(vlm(**ours).logits_per_image, expected, FLOAT32, "logits_per_image")
