"""The IDEFICS from end to end: the committed PyTorch checkpoint talks about pictures it has never seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import demo

EXAMPLE = Path(__file__).parents[2] / "examples" / "idefics-digits"
CHECKPOINT = EXAMPLE / "checkpoint"
SPEECHES = demo.read_speeches(EXAMPLE)


@pytest.fixture(scope="module")
def vlm() -> flax_vlm.VLM:
    return flax_vlm.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def talk(vlm: flax_vlm.VLM) -> demo.Talk:
    return demo.ask_held_out(vlm, EXAMPLE)


def test_names_held_out_digits_in_every_language(talk: demo.Talk) -> None:
    assert [speech.language for speech in talk.speeches] == ["English", "German", "Greek", "Chinese"]
    for speech in talk.speeches:
        scores = talk.scores(speech)
        assert {total for _, total in scores.values()} >= {360, 180}, "every picture is named, in lists of one to three"
        for what, (right, total) in scores.items():
            assert right >= 0.95 * total, (speech.language, what)


def test_the_model_card_reports_what_is_measured(talk: demo.Talk) -> None:
    card = (CHECKPOINT / "README.md").read_text("utf-8")
    for speech in talk.speeches:
        for right, total in talk.scores(speech).values():
            row = next(line for line in card.splitlines() if line.startswith(f"| {speech.language} |"))
            assert f"{right / total:.1%}, {right} of {total}" in row, "run evaluate.py --write-card"


def test_answers_depend_on_the_pictures(vlm: flax_vlm.VLM, talk: demo.Talk) -> None:
    """The same question about the same pictures in another order."""
    with np.load(EXAMPLE / "heldout.npz") as file:
        images = file["images"]
    question = next(q for q in talk.questions if q.task == "naming" and len(set(q.digits)) == 3)
    turned = [images[i] for i in reversed(question.pictures)]
    inputs = vlm.processor([question.items(turned)])
    pieces: Any = vlm.generate(**inputs, max_new_tokens=24, stream=True)
    assert "".join(pieces) == question.speech.say(question.digits[::-1])


def test_answers_are_what_their_languages_say() -> None:
    english, chinese = SPEECHES[0], SPEECHES[-1]
    assert english.say([3]) == " three." and english.say([3, 0, 9]) == " three, zero and nine."
    assert chinese.say([3, 0]) == "三和零。" and chinese.heard("三、零和九。") == ["三", "零", "九"]
    for speech in SPEECHES:
        assert len(set(speech.words)) == 10
        assert speech.heard(speech.say([1, 2, 3])) == [speech.words[digit] for digit in (1, 2, 3)]
        counts = [{prompt.count("<image>") for prompt in wordings} for wordings in speech.naming]
        assert counts == [{1}, {2}, {3}] and {prompt.count("<image>") for prompt in speech.larger} == {2}


def test_a_wrong_answer_is_counted() -> None:
    speech = SPEECHES[0]
    naming = demo.Question(speech, "naming", speech.naming[1][0], (0, 1), (4, 7))
    larger = demo.Question(speech, "larger", speech.larger[0], (0, 1), (7,))
    answers = [" four and nine.", " seven, seven and seven.", " seven", " seven."]
    talk = demo.Talk([naming, naming, larger, larger], answers)
    assert talk.scores(speech) == {"pictures named": (2, 4), "whole lists": (0, 2), "larger digits": (1, 2)}


def test_held_out_pictures_are_those_of_the_image_tower() -> None:
    with np.load(EXAMPLE / "heldout.npz") as ours, np.load(EXAMPLE.parent / "altclip-digits/heldout.npz") as towers:
        np.testing.assert_array_equal(ours["images"], towers["images"])
        np.testing.assert_array_equal(ours["labels"], towers["labels"])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.usefixtures("silent_transformers")
def test_transformers_says_the_same(vlm: flax_vlm.VLM, talk: demo.Talk) -> None:
    import torch
    import transformers

    model, info = transformers.IdeficsForVisionText2Text.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(CHECKPOINT)
    with np.load(EXAMPLE / "heldout.npz") as file:
        images = [Image.fromarray(image).convert("RGB") for image in file["images"]]
    chosen = talk.questions[:: len(talk.questions) // 40]
    assert {len(question.pictures) for question in chosen} == {1, 2, 3}, "ragged"
    prompts = [question.items([images[i] for i in question.pictures]) for question in chosen]
    ours = vlm.processor(prompts)
    theirs = processor(text=prompts, return_tensors="pt")
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["image_attention_mask"], theirs["image_attention_mask"])
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"].permute(0, 1, 3, 4, 2))
    width = ours["input_ids"].shape[1]
    for options in ({}, {"num_beams": 3}):
        with torch.inference_mode():
            expected = model.generate(**theirs, max_new_tokens=24, **options).numpy()
        output: Any = vlm.generate(**ours, max_new_tokens=24, **options)
        assert output.sequences.shape == expected.shape
        # Behind the end of an answer transformers' beams have the stop id where padding is 0.
        for row, other, length in zip(output.sequences, expected, output.lengths, strict=True):
            np.testing.assert_array_equal(row[: width + length], other[: width + length])
