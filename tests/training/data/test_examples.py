"""What is made of a record: the ids of the processor, labels for what is to be learnt, the pictures that are kept."""

from typing import Any

import numpy as np
import pytest

from flax_vlm.training.data.examples import LAYOUTS, Example, Limits
from tests.training.data.conftest import gray

PAIR = {"image": gray(1), "text": "One two."}
DOCUMENT = {
    "images": [gray(1), None, None, gray(2), gray(3), None],
    "texts": [None, "One digit.", "Two.", None, None, "Three."],
}
ASKED = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A seven."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
CHAT = {"messages": ASKED, "images": [gray(4)]}


@pytest.fixture
def make(request):
    """Makes an example of a record with the processor of a family."""

    def make(family: str, record: dict[str, Any], form: str, tokens: int = 300, images: int = 8) -> Example:
        processor = request.getfixturevalue(family)
        return LAYOUTS[family](processor, record, form, Limits(tokens, images), np.random.default_rng(0))

    return make


def learnt(processor: Any, example: Example) -> list[str]:
    """The text of each stretch of ids that are learnt."""
    stretches: list[list[int]] = []
    is_learnt = example.labels != -100
    np.testing.assert_array_equal(example.labels[is_learnt], example.input_ids[is_learnt])
    for position in np.flatnonzero(is_learnt):
        if not is_learnt[position - 1]:
            stretches.append([])
        stretches[-1].append(example.input_ids[position])
    return [processor.decode(stretch, skip_special_tokens=False).strip() for stretch in stretches]


def test_idefics_learns_every_word_of_documents(make, idefics) -> None:
    example = make("idefics", DOCUMENT, "documents")
    prompt = [DOCUMENT["images"][0], "One digit.\n\nTwo.", *DOCUMENT["images"][3:5], "Three."]
    by_hand = idefics([prompt], add_eos_token=True)
    np.testing.assert_array_equal(example.input_ids, by_hand["input_ids"][0])
    np.testing.assert_array_equal(example.image_mask, by_hand["image_attention_mask"][0])
    np.testing.assert_array_equal(example.pixels, by_hand["pixel_values"][0])
    assert learnt(idefics, example) == ["One digit.\n\nTwo.", "Three.</s>"]
    assert learnt(idefics, make("idefics", PAIR, "pairs")) == ["One two.</s>"]
    assert learnt(idefics, make("idefics", {"images": [None], "texts": ["One."]}, "documents")) == ["One.</s>"]


def test_glm4v_reads_documents_as_conversations(make, glm4v) -> None:
    example = make("glm4v", DOCUMENT, "documents")
    by_hand = glm4v(
        [
            {"role": "user", "image": gray(1), "content": ""},
            {"role": "assistant", "content": "One digit.\n\nTwo."},
            {"role": "user", "content": [{"type": "image", "image": gray(level)} for level in (2, 3)]},
            {"role": "assistant", "content": "Three."},
        ]
    )
    np.testing.assert_array_equal(example.input_ids[:-1], by_hand["input_ids"][0])
    np.testing.assert_array_equal(example.pixels, by_hand["images"][0])
    assert learnt(glm4v, example) == ["One digit.\n\nTwo. <|user|>", "Three. <|user|>"]
    assert learnt(glm4v, make("glm4v", PAIR, "pairs")) == ["One two. <|user|>"]
    first_told = make("glm4v", {"images": [None, gray(1)], "texts": ["One.", None]}, "documents")
    assert learnt(glm4v, first_told) == ["One. <|user|>"] and len(first_told.pixels) == 1


@pytest.mark.parametrize("family", ["idefics", "glm4v"])
def test_of_conversations_the_answers_are_learnt(make, family, request) -> None:
    processor = request.getfixturevalue(family)
    ends = {"idefics": ["<end_of_utterance>", "<end_of_utterance></s>"], "glm4v": [" <|user|>", " <|user|>"]}[family]
    example = make(family, CHAT, "conversations")
    assert learnt(processor, example) == [f"A seven.{ends[0]}", f"Yes.{ends[1]}"]
    assert len(example.pixels) == 1
    # An open question at the end is nobody's to learn.
    asked = make(family, CHAT | {"messages": [*ASKED[:2], ASKED[2]]}, "conversations")
    assert learnt(processor, asked) == [f"A seven.{ends[0]}"]


ORDERED = [
    {"type": "text", "text": "First "},
    {"type": "image", "image": gray(1)},
    {"type": "text", "text": ", then ", "image": None},
    {"type": "image"},
    {"type": "text", "text": ". These are"},
]


def test_idefics_learns_the_answers_of_questions(make, idefics) -> None:
    example = make("idefics", {"question": ORDERED, "images": [gray(2)], "answer": " one and two."}, "questions")
    by_hand = idefics(
        [["First", gray(1), ", then", gray(2), ". These are one and two."]],
        add_eos_token=True,
        add_end_of_utterance_token=False,
    )
    np.testing.assert_array_equal(example.input_ids, by_hand["input_ids"][0])
    np.testing.assert_array_equal(example.image_mask, by_hand["image_attention_mask"][0])
    np.testing.assert_array_equal(example.pixels, by_hand["pixel_values"][0])
    assert learnt(idefics, example) == ["one and two.</s>"]
    shown = {"question": [{"type": "image", "image": gray(1)}], "answer": "One."}
    assert learnt(idefics, make("idefics", shown, "questions")) == ["One.</s>"]
    assert learnt(idefics, make("idefics", {"question": "Two?", "answer": " Yes."}, "questions")) == ["Yes.</s>"]


def test_glm4v_reads_questions_as_conversations(make, glm4v) -> None:
    example = make("glm4v", {"image": gray(3), "question": "How many?", "answer": "Two."}, "questions")
    content = [{"type": "image", "image": gray(3)}, {"type": "text", "text": "How many?"}]
    by_hand = glm4v([{"role": "user", "content": content}, {"role": "assistant", "content": "Two."}])
    np.testing.assert_array_equal(example.input_ids[:-1], by_hand["input_ids"][0])
    np.testing.assert_array_equal(example.pixels, by_hand["images"])
    assert learnt(glm4v, example) == ["Two. <|user|>"]


def test_one_of_the_answers_is_drawn(idefics) -> None:
    record = {"question": "Which?", "answers": [" One.", " Two."]}
    drawn = [
        LAYOUTS["idefics"](idefics, record, "questions", Limits(30, 0), np.random.default_rng(seed))
        for seed in range(9)
    ]
    assert {learnt(idefics, example)[0] for example in drawn} == {"One.</s>", "Two.</s>"}


@pytest.mark.parametrize("family", ["idefics", "glm4v"])
def test_every_way_to_name_a_picture_is_one(make, family) -> None:
    expected = make(family, CHAT, "conversations")
    question = {"type": "text", "text": "What is this?"}
    ways = [
        ([{"type": "image", "image": gray(4)}, question], None, None),
        ([{"type": "image", "text": None, "image": None}, question | {"image": None}], None, [gray(4)]),
        ("What is this?", gray(4), None),
    ]
    for content, image, images in ways:
        first = {"role": "user", "content": content, "image": image}
        found = make(family, {"messages": [first, *ASKED[1:]], "images": images}, "conversations")
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_pairs_of_altclip(make, altclip) -> None:
    texts = ["one two three", "four"]
    drawn = [
        LAYOUTS["altclip"](altclip, PAIR | {"texts": texts}, "pairs", Limits(4, 1), np.random.default_rng(seed))
        for seed in range(9)
    ]
    by_hand = [altclip([text], max_length=4)["input_ids"][0].tolist() for text in texts]
    assert {tuple(example.input_ids) for example in drawn} == set(map(tuple, by_hand))
    np.testing.assert_array_equal(drawn[0].pixels, altclip(images=[gray(1)])["pixel_values"])
    assert make("altclip", PAIR, "pairs").labels is None


@pytest.mark.parametrize("family", ["idefics", "glm4v"])
def test_rows_are_cut_between_pictures(make, family) -> None:
    """At any length there are as many pictures as whole placeholders, and masks and labels of that length."""
    whole = make(family, DOCUMENT, "documents")
    ends = {"idefics": [3, 15, 17], "glm4v": [7, 29, 32]}[family]
    assert len(whole.input_ids) > ends[-1] + 5
    for length in range(10, len(whole.input_ids) + 3):
        cut = make(family, DOCUMENT, "documents", tokens=length)
        kept = sum(end <= length for end in ends)
        tokens = len(cut.input_ids)
        assert length - 3 < tokens <= length or tokens == len(whole.input_ids)
        np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:tokens])
        np.testing.assert_array_equal(cut.labels, whole.labels[:tokens])
        np.testing.assert_array_equal(cut.pixels, whole.pixels[:kept])
        if family == "idefics":
            np.testing.assert_array_equal(cut.image_mask, whole.image_mask[:tokens, :kept])


@pytest.mark.parametrize("family", ["idefics", "glm4v"])
def test_pictures_too_many_end_the_row(make, family, request) -> None:
    processor = request.getfixturevalue(family)
    example = make(family, DOCUMENT, "documents", images=2)
    end = {"idefics": "", "glm4v": " <|user|>"}[family]  # of what is cut the end is not learnt
    assert len(example.pixels) == 2 and learnt(processor, example) == ["One digit.\n\nTwo." + end]
    again = {"role": "user", "content": [{"type": "image", "image": gray(5)}, {"type": "text", "text": "And this?"}]}
    chat = {"messages": [*ASKED, again, ASKED[1]], "images": None}
    cut = make(family, chat, "conversations", images=0)
    np.testing.assert_array_equal(cut.input_ids, make(family, {"messages": ASKED}, "conversations").input_ids)


def test_cut_pictures_are_not_opened(make) -> None:
    damaged = {"images": [gray(1), None, b"damaged"], "texts": [None, "One two three four five.", None]}
    assert len(make("idefics", damaged, "documents", tokens=9).pixels) == 1
    with pytest.raises(ValueError, match="expected a picture that Pillow can read"):
        make("idefics", damaged, "documents")


@pytest.mark.parametrize(
    ("form", "record", "error"),
    [
        ("pairs", {"text": "x"}, r'expected "image", got \[\'text\'\]'),
        ("pairs", {"image": gray(1)}, 'expected "text"'),
        ("documents", {"images": [None], "texts": [None]}, "a picture or a text at each place"),
        ("documents", {"images": [gray(1), gray(2)], "texts": [None, "b"]}, "a picture or a text at each place"),
        ("documents", {"images": [gray(1)], "texts": [None]}, "expected a text among the pictures"),
        ("questions", {"question": "What?"}, 'expected "answer"'),
        ("questions", {"answer": " One."}, 'expected "question"'),
        ("questions", {"question": "A th", "answer": "ree."}, "Does the answer begin with a space"),
        ("questions", {"question": "x", "images": [gray(1)] * 9, "answer": " y"}, "at most 8 pictures in a question"),
        ("conversations", {"messages": ASKED[:1]}, "expected something to learn"),
        ("conversations", {"messages": ASKED[1:2], "images": [gray(1)]}, "expected a message of the user"),
        ("conversations", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "each of 1 places, got 0"),
    ],
)
def test_records_of_which_nothing_can_be_made(make, form, record, error) -> None:
    with pytest.raises(ValueError, match=error):
        make("idefics", record, form)
