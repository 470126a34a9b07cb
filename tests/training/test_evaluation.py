"""Measures, against what was worked out by hand; and what runs a model, with one that only counts."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_vlm.generation import GenerationConfig
from flax_vlm.training import evaluation


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        (" A Dog.", ["cat", "dog"], True),
        ("the  «dog»!", ["Dog"], True),
        ("dogs", ["dog"], False),
        ("3.5", ["35"], False),
        ("1,5", ["1,5"], True),
        ("-5", ["5"], False),
        ("B", ["A"], False),
        ("a", ["A."], True),
        ("", ["A"], False),
        ("Straße", ["STRASSE"], True),
        ("ｅｐτά。", ["epτά"], True),
        ("七。", ["七"], True),
        ("it's", ["its"], False),
    ],
)
def test_exact_match(answer: str, references: list[str], right: bool) -> None:
    assert evaluation.exact_match(answer, references) == right


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The two dogs.", "2 dogs"),
        ("None", "0"),
        ("yes\n", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("- shirt-", "shirt"),  # a mark that stands alone once goes without a space everywhere
        ("1,000", "1000"),
        ("a 1,000-m run", "1000m run"),  # so do all marks beside a number with a comma
        ("2.5 m.", "2.5 m"),
        ("5.", "5"),
        ("dont", "don't"),
        ("Couldntve wouldn'tve couldnt've", "couldntve wouldn't've couldn't've"),
        ("yalld've y'alld've y'all'dve yall'd've", "yalld've y'all'd've y'all'd've y'all'd've"),
        ("twas 5 oclock", "'twas 5 o'clock"),
        ("what?", "what"),
        ("a", ""),
        ("who's it? theirs!", "who's it theirs"),
    ],
)
def test_the_form_of_vqa(answer: str, form: str) -> None:
    assert evaluation.vqa_form(answer) == form


def test_vqa_accuracy_by_how_many_said_so() -> None:
    found = [evaluation.vqa_accuracy("Two.", ["2"] * same + ["many"] * (10 - same)) for same in range(11)]
    np.testing.assert_allclose(found, [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1])
    assert evaluation.vqa_accuracy("Yes", ["yes"] * 10) == 1
    with pytest.raises(ValueError, match="the answers of 4 people or more, usually of 10, came 3"):
        evaluation.vqa_accuracy("Two.", ["2", "2", "2"])


@given(st.lists(st.sampled_from(["red", "blue", "Red."]), min_size=4, max_size=12))
def test_vqa_accuracy_leaves_each_person_out_once(references: list[str]) -> None:
    each = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        each.append(min(sum(other != "blue" for other in others) / 3, 1))
    assert evaluation.vqa_accuracy("red", references) == pytest.approx(sum(each) / len(each))


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_zero_shot_accuracy() -> None:
    rng = np.random.default_rng(0)
    images, classes, labels = unit(rng, 40, 3), unit(rng, 7, 3), rng.integers(0, 7, 40)
    order = np.argsort(-images @ classes.T, axis=-1)
    found = evaluation.zero_shot_accuracy(images, classes, labels)
    assert found == {
        "accuracy@1": np.mean(order[:, 0] == labels),
        "accuracy@5": np.mean((order[:, :5] == labels[:, None]).any(-1)),
    }
    assert 0 < found["accuracy@1"] < found["accuracy@5"] < 1
    assert evaluation.zero_shot_accuracy(images, classes[:5], labels % 5).keys() == {"accuracy@1"}
    for nothing_told in (np.ones((7, 3)), np.full((7, 3), np.nan)):
        assert evaluation.zero_shot_accuracy(images, nothing_told, labels)["accuracy@1"] == 0


def test_recall_of_several_captions() -> None:
    #          of picture 0   of 1   of 2
    scores = [[0.9, 0.1, 0.8, 0.7], [0.2, 0.3, 0.6, 0.5], [0.4, 0.5, 0.95, 0.3]]
    images, texts = np.array(scores), np.eye(4)
    found = evaluation.recall(images, texts, np.array([0, 0, 1, 2]), at=(1, 2, 3))
    # Text 0 finds its picture first, the others third; pictures 0 and 1 find a text of theirs first, 2 last.
    assert found == pytest.approx(
        {
            "text_to_image_recall@1": 1 / 4,
            "text_to_image_recall@2": 1 / 4,
            "text_to_image_recall@3": 1,
            "image_to_text_recall@1": 2 / 3,
            "image_to_text_recall@2": 2 / 3,
            "image_to_text_recall@3": 2 / 3,
        }
    )
    for nothing_told in (np.ones((3, 4)), np.full((3, 4), np.nan)):
        alike = evaluation.recall(nothing_told, np.ones((4, 4)), np.array([0, 0, 1, 2]), at=(1,))
        assert set(alike.values()) == {0.0}


def test_recall_in_blocks_is_recall() -> None:
    rng = np.random.default_rng(1)
    images, texts, owner = unit(rng, 1100, 5), unit(rng, 2100, 5), rng.permutation(np.arange(2100) % 1100)
    scores = texts @ images.T
    of_texts = (scores > scores[np.arange(2100), owner][:, None]).sum(-1)
    of_images = [(scores[:, i] > scores[owner == i, i].max()).sum() for i in range(1100)]
    found = evaluation.recall(images, texts, owner, at=(1, 10))
    assert found["text_to_image_recall@10"] == np.mean(of_texts < 10)
    assert found["image_to_text_recall@10"] == np.mean(np.array(of_images) < 10)
    assert found["image_to_text_recall@1"] == np.mean(np.array(of_images) < 1)


class Counting:
    """A model to which a number is both a picture and the word for it, and that notes what it is asked."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.asked: list[Any] = []
        self.processor: Any = self.read

    def read(self, prompts: Any = None, *, images: Any = None, text: Any = None, **options: Any) -> dict[str, Any]:
        given = next(each for each in (prompts, images, text) if each is not None)
        if "transform" not in options and not (text and not options):  # where they are not but measured
            self.sizes.append(len(given))
            self.asked += [(each, options) for each in given]
        return {"given": given, "input_ids": np.zeros((len(given), 3), int)}

    def vectors(self, given: Any, **_: Any) -> np.ndarray:
        angles = np.array([0.1 * float(str(each).split()[-1]) for each in given])
        return 3 * np.stack([np.cos(angles), np.sin(angles)], -1)

    get_image_features = get_text_features = vectors
    mesh = None


class Talking(Counting):
    """Answers with the last word of a question."""

    def __init__(self) -> None:
        super().__init__()
        reading = type("Processor", (), {"__call__": lambda _, *args, **options: self.read(*args, **options)})
        self.processor = reading()
        self.processor.decode = lambda ids: self.words[ids[0]]
        self.processor.answer_begins = ""
        self.generation_config = GenerationConfig()

    def generate(self, given: Any, input_ids: Any, max_new_tokens: int) -> Any:
        assert max_new_tokens == 6
        texts = [prompt[-1] if isinstance(prompt[-1], str) else prompt[-1]["content"][-1]["text"] for prompt in given]
        self.words = [text.split()[-1] for text in texts]
        sequences = np.concatenate([input_ids, np.arange(len(given))[:, None]], axis=1)
        return SimpleNamespace(sequences=sequences, lengths=np.ones(len(given), int))


def questions() -> list[dict[str, Any]]:
    return [
        {"image": b"0", "question": "say one", "answer": "One."},
        {"image": b"1", "question": "say two", "answers": ["three", {"answer": "two"}]},
        {"images": [b"2", b"3"], "question": "say four", "answers": ["five"]},
        {"messages": [{"role": "user", "content": "say six"}, {"role": "assistant", "content": "six"}]},
        {"image": b"4", "question": "say eight", "answer": "nine"},
    ]


def test_questions_are_asked_in_the_layout_of_a_chat() -> None:
    vlm = Talking()
    found = evaluation.question_answering(vlm, questions(), evaluation.exact_match, batch_size=2, max_new_tokens=6)
    assert found == {"questions": 5, "exact_match": 3 / 5}
    assert vlm.sizes == [2, 2, 2], "the last batch is filled up"
    two = [{"type": "image", "image": b"2"}, {"type": "image", "image": b"3"}, {"type": "text", "text": "say four"}]
    both = {"add_generation_prompt": True, "pad_images_to_multiple_of": 2}
    assert ([{"role": "user", "content": two}], both) in vlm.asked
    none = {"add_generation_prompt": True, "pad_images_to_multiple_of": None}
    assert vlm.asked.count(([{"role": "user", "content": [{"type": "text", "text": "say six"}]}], none)) == 2


def test_questions_in_a_text_of_ones_own() -> None:
    vlm = Talking()
    records = [{**record, "answers": ["one"] * 10} for record in questions()[:3]]
    found = evaluation.question_answering(
        vlm, records, evaluation.vqa_accuracy, template="Q: {}", batch_size=4, max_new_tokens=6
    )
    assert found == {"questions": 3, "vqa_accuracy": pytest.approx(1 / 3)}
    assert ([b"2", b"3", "Q: say four"], {"pad_images_to_multiple_of": 2}) in vlm.asked
    with pytest.raises(ValueError, match="template: expected none for conversations"):
        evaluation.question_answering(vlm, questions(), evaluation.exact_match, template="Q: {}", max_new_tokens=6)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "?", "answer": "!"},
            r"expected 'messages' or 'image' in a record, came \['an",
        ),
        ({"image": b"0", "answer": "!"}, "expected 'question' in a record"),
        ({"image": b"0", "question": "?"}, "expected 'answers' or 'answer' in a record"),
        (
            {"messages": [{"role": "user", "content": "?"}]},
            "expected one of the assistant at the end, came",
        ),
    ],
)
def test_records_that_are_no_questions(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation.question_answering(Talking(), [record], evaluation.exact_match, max_new_tokens=6)


def test_zero_shot() -> None:
    vlm = Counting()
    records = [
        {"image": number, "label": f"no {label}"} for number, label in ((3, 3), (5, 5), (8, 9), (3.5, 3), (9, 9))
    ]
    found = evaluation.zero_shot(vlm, records, batch_size=2, templates=("a {}", "the {}"))
    assert found == {"pictures": 5, "labels": 3, "accuracy@1": 1.0}
    assert set(vlm.sizes) == {2}
    by_number = [{"image": 3, "label": 1}, {"image": 8, "label": 0}]
    assert evaluation.zero_shot(vlm, by_number, labels=["x 3", "x 8"])["accuracy@1"] == 0
    assert evaluation.zero_shot(vlm, by_number, labels=["x 8", "x 3"])["accuracy@1"] == 1


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ([1, 0], (), "expected texts, came numbers. Say in --labels what they mean"),
        (["1", "1"], (), r"expected two labels or more to choose from, came \['1'\]"),
        (["1", "3"], ("1", "2"), "expected one of 2 labels or its number, came '3'"),
        ([0, 2], ("1", "2"), "expected one of 2 labels or its number, came 2"),
    ],
)
def test_labels_that_cannot_be(labels: list[Any], given: tuple[str, ...], message: str) -> None:
    records = [{"image": 3, "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        evaluation.zero_shot(Counting(), records, labels=given)
    with pytest.raises(ValueError, match=r"template 'a photo': expected \{\} where the label goes"):
        evaluation.zero_shot(Counting(), records, templates=["a photo"])


def test_retrieval() -> None:
    vlm = Counting()
    records = [
        {"image": 1, "texts": ["a 1", "b 2"]},
        {"image": 4, "caption": "c 4"},
        {"image": 7, "captions": ["d 5", "e 4"]},
    ]
    found = evaluation.retrieval(vlm, records, batch_size=2, at=(1, 2))
    assert found == pytest.approx(
        {
            "pictures": 3,
            "captions": 5,
            "text_to_image_recall@1": 3 / 5,  # 5 and 4 are nearer to picture 4
            "text_to_image_recall@2": 1,
            "image_to_text_recall@1": 2 / 3,  # picture 4 has one as near of picture 7's
            "image_to_text_recall@2": 1,
        }
    )
    assert set(vlm.sizes) == {2}
    with pytest.raises(ValueError, match="expected 'texts' or 'text' or 'captions' or 'caption' in a record"):
        evaluation.retrieval(vlm, [{"image": 1}])
    with pytest.raises(ValueError, match="expected at least one of every picture, came an empty list"):
        evaluation.retrieval(vlm, [{"image": 1, "texts": []}])


@pytest.mark.parametrize("run", [evaluation.zero_shot, evaluation.retrieval])
def test_no_records(run: Any) -> None:
    with pytest.raises(ValueError, match="expected at least one record, came none"):
        run(Counting(), [])


def test_a_question_may_have_pictures_among_its_texts() -> None:
    one, other = ({"type": "image", "image": f"{name}.png"} for name in "ab")
    content = [one, {"type": "text", "text": " or "}, other, {"type": "text", "text": "?"}]
    record = {"question": content, "answers": ["a", "the first"]}
    answers = ["a", "the first"]
    assert evaluation.prompt_and_answers(record, "{}") == (["a.png", " or ", "b.png", "?"], answers)
    assert evaluation.prompt_and_answers(record, None) == ([{"role": "user", "content": content}], answers)
    with pytest.raises(ValueError, match=r"template: expected '{}' for a question with pictures among its texts"):
        evaluation.prompt_and_answers(record, "Question: {}")
