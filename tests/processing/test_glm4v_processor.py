"""The GLM-4V processor against what THUDM's own code wrote down: ids, masks, texts and pixels; and its refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flax_vlm.processing import GLM4VProcessor, ImageProcessor

GOLDEN = Path(__file__).parents[1] / "golden" / "glm4v" / "tokenizer"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text("utf-8"))
CHATS = [name for name, case in CASES.items() if "conversation" in case]
TEXTS = [name for name in CASES if name.startswith("encode:")]
BEGIN, PLACEHOLDER, END = 410, 400, 411
RNG = np.random.default_rng(0)
DOG, CAT = (Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(2))


@pytest.fixture(scope="module")
def processor() -> GLM4VProcessor:
    return GLM4VProcessor.from_dir(GOLDEN)


@pytest.fixture(scope="module")
def golden_image() -> tuple[Image.Image, np.ndarray]:
    """A picture, and its pixels as the original's transform gives them, here channels-last."""
    with np.load(GOLDEN / "image.npz") as arrays:
        return Image.fromarray(arrays["image"]), arrays["pixel_values"].transpose(1, 2, 0)


def chat(case: str, image: Any) -> list[dict[str, Any]]:
    """The messages of a case, with its picture in its place."""
    return [message | ({"image": image} if "image" in message else {}) for message in CASES[case]["conversation"]]


def user(*content: str | Image.Image) -> dict[str, Any]:
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in content]
    return {"role": "user", "content": parts}


def assert_same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("name", CHATS)
def test_chats_equal_the_original(processor: GLM4VProcessor, golden_image, name: str) -> None:
    case, (image, pixels) = CASES[name], golden_image
    messages = chat(name, image)
    ours = processor(messages, add_generation_prompt=case["add_generation_prompt"])
    assert {"input_ids", "attention_mask"} | ({"images"} if case["has_image"] else set()) == ours.keys()
    for key in ("input_ids", "attention_mask"):
        assert ours[key].dtype == np.int32
        np.testing.assert_array_equal(ours[key], [case[key]])
    if case["has_image"]:
        assert ours["images"].dtype == np.float32
        np.testing.assert_array_equal(ours["images"], pixels[None])  # bit for bit
    ids = [i for i in case["input_ids"] if i not in (BEGIN, PLACEHOLDER, END)]
    assert processor.tokenizer.decode(ids) == case["string"]
    # The same with lists as content.
    listed = [
        {key: value for key, value in message.items() if key not in ("image", "content")}
        | {"content": user(*([message["image"]] if "image" in message else []), message["content"])["content"]}
        for message in messages
    ]
    assert_same(processor(listed, add_generation_prompt=case["add_generation_prompt"]), ours)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_equal_the_original(processor: GLM4VProcessor, name: str) -> None:
    case, text = CASES[name], name.removeprefix("encode:")
    assert processor.tokenizer(text)["input_ids"].tolist() == [case["ids"]]
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"].tolist() == [case["ids_plain"]]
    assert processor.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    assert processor.decode(np.array(case["ids"])) == case["decoded_skip"]
    assert processor.batch_decode([case["ids"]] * 2) == [case["decoded_skip"]] * 2


def test_batches_equal_the_original(processor: GLM4VProcessor, golden_image) -> None:
    image, pixels = golden_image
    ours = processor([chat("image/gen", image), chat("multi_turn/gen", image)], add_generation_prompt=True)
    case = CASES["batch_left_padded"]
    for key in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(ours[key], case[key])
    np.testing.assert_array_equal(ours["images"], np.stack([pixels, pixels]))
    # The model counts positions by the mask, which gives those of the original.
    np.testing.assert_array_equal(np.maximum(ours["attention_mask"].cumsum(-1) - 1, 0), case["position_ids"])


def test_every_case_is_compared() -> None:
    assert {*CHATS, *TEXTS, "batch_left_padded"} == CASES.keys()
    assert len(CHATS) == 16 and len(TEXTS) == 9


def test_what_one_person_says_is_answered(processor: GLM4VProcessor) -> None:
    expected = processor([user(DOG, "What is in the image?")], add_generation_prompt=True)
    assert expected["input_ids"].tolist() == [CASES["image/gen"]["input_ids"]]
    for prompt in (
        [DOG, "What is in the image?"],
        (DOG, "What is", " in the image?"),
        [[DOG, "What is in the image?"]],
    ):
        assert_same(processor(prompt), expected)
    assert_same(processor("What is in the image?", DOG), expected)
    alone = processor(["hello world"])
    assert alone["input_ids"].tolist() == [CASES["text/gen"]["input_ids"]]
    assert_same(processor("hello world"), alone)
    open_end = processor("hello world", add_generation_prompt=False)
    assert open_end["input_ids"].tolist() == [CASES["text/nogen"]["input_ids"]]
    assert_same(processor([{"role": "user", "content": "hello world"}]), open_end)


def test_rows_without_a_picture_get_zeros(processor: GLM4VProcessor) -> None:
    batch = processor([[DOG, "hello"], ["hello world"], [CAT]])
    assert batch["images"].shape == (3, 112, 112, 3) and not batch["images"][1].any()
    assert (batch["input_ids"] == BEGIN).sum(-1).tolist() == [1, 0, 1]
    assert_same(processor(["hello", "hello world", ""], [DOG, None, CAT]), batch)
    for row, source in ((0, DOG), (2, CAT)):
        np.testing.assert_array_equal(batch["images"][row], processor([source])["images"][0])
    assert "images" not in processor([["hello"], ["hello world"]])


def test_several_pictures_and_later_ones(processor: GLM4VProcessor) -> None:
    messages = [user(DOG, CAT, "hello"), {"role": "assistant", "content": "\n"}, user(DOG, "world")]
    ours = processor([messages, [user("hello")]])
    triple = [BEGIN, PLACEHOLDER, END]
    hello, (newline,) = processor.tokenizer.ordinary_ids("hello"), processor.tokenizer.ordinary_ids("\n")
    expected = [402, 404, 407, newline, *triple, *triple, *hello, 408, newline, newline, 407, newline, *triple]
    assert ours["input_ids"][0].tolist() == [*expected, *processor.tokenizer.ordinary_ids("world")]
    assert ours["images"].shape == (2, 3, 112, 112, 3) and not ours["images"][1].any()
    np.testing.assert_array_equal(ours["images"][0, [0, 2]], processor([DOG])["images"].repeat(2, 0))
    rounded = processor([messages], pad_images_to_multiple_of=2)["images"]
    assert rounded.shape == (1, 4, 112, 112, 3) and not rounded[:, 3].any()
    np.testing.assert_array_equal(rounded[:, :3], ours["images"][:1])


def test_widths_and_sides(processor: GLM4VProcessor) -> None:
    batch = [["hello world"], ["hello"]]
    assert processor(batch, pad_to_multiple_of=16)["input_ids"].shape == (2, 16)
    wide = processor(batch, padding="max_length", max_length=20, padding_side="right")
    assert wide["attention_mask"].sum(-1).tolist() == [7, 6] and wide["attention_mask"][:, :6].all()
    assert (wide["input_ids"][:, 7:] == PLACEHOLDER).all()
    with pytest.raises(ValueError, match="padding=False"):
        processor(batch, padding=False)
    with pytest.raises(ValueError, match='max_length=9: expected padding="max_length" too, got True'):
        processor(batch, max_length=9)
    with pytest.raises(ValueError, match="at most max_length=3"):
        processor(batch, padding="max_length", max_length=3)


def test_transform_stands_in_for_the_image_processor(processor: GLM4VProcessor) -> None:
    pixels = processor([[DOG], ["hello"]], transform=lambda image: np.full((4, 6, 3), image.width))["images"]
    assert pixels.shape == (2, 4, 6, 3) and pixels[:, 0, 0, 0].tolist() == [30, 0]


def test_saved_folder_gives_the_same(processor: GLM4VProcessor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    again = GLM4VProcessor.from_dir(tmp_path)
    assert again.image_processor == processor.image_processor != ImageProcessor()
    prompt = [*chat("multi_turn/gen", DOG), {"role": "user", "content": "<|user|>  [gMASK]\t描述"}]
    assert_same(again(prompt), processor(prompt))
    text = "[gMASK]<sop><|user|>\nhi"
    assert_same(again.tokenizer(text), processor.tokenizer(text))


@pytest.mark.torch
def test_saved_folder_gives_equal_ids_in_transformers(processor: GLM4VProcessor, tmp_path: Path, hard_texts) -> None:
    processor.save(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    texts = [*hard_texts, *(name.removeprefix("encode:") for name in TEXTS)]
    ours, expected = processor.tokenizer(texts), theirs(texts, padding=True, return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(ours[name], expected[name])


def test_files_of_a_text_model_take_no_pictures(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "tokenizer_config.json").read_text("utf-8"))
    del config["image_size"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        GLM4VProcessor.from_dir(tmp_path)
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    text = GLM4VProcessor.from_dir(tmp_path)
    assert text("hello world")["input_ids"].tolist() == [CASES["text/gen"]["input_ids"]]
    with pytest.raises(ValueError, match=r"got pictures: tokenizer_config\.json has no image_size"):
        text([DOG])
    config["added_tokens_decoder"] = {i: t for i, t in config["added_tokens_decoder"].items() if int(i) < 408}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    bare = GLM4VProcessor.from_dir(tmp_path)
    for prompt, token in (("hello", "<|assistant|>"), ([DOG], "<|begin_of_image|>")):
        with pytest.raises(ValueError, match=token.replace("|", r"\|") + ", which this prompt needs"):
            bare(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "got an empty list"),
        (DOG, "a prompt or a list of prompts, got Image"),
        ([["a"], "b"], "lists beside other things"),
        (["a", 3], "texts and pictures .* got int"),
        (["a", "https://example.org/cat.png"], r"address https://example.org/cat\.png. Download it"),
        ([Path("missing.png")], "missing.png"),
        ([np.zeros((3, 8, 9), np.uint8)], "channels first: pass x.transpose"),
        (["Who is", DOG], "got a picture behind the text 'Who is'. Put it in front"),
        ([DOG, "or", CAT, "?"], "got a picture behind the text 'or'"),
        ([user("Who is", DOG)], "got a picture behind the text 'Who is'"),
        ([user("a"), "b"], "chat: expected messages .* got 'b'"),
        ([{"role": "tool", "content": "a"}], "role.*user, assistant, observation.*'tool'"),
        ([{"role": "user"}], "chat: expected messages"),
        ([{"role": "user", "content": None}], "as content, got {'text': None"),
        ([{"role": "user", "content": ["a"]}], "as content, got 'a'"),
        ([{"role": "system", "content": "a", "tools": []}], r"got \['tools'\]. GLM-4V was not tuned on tools"),
        ([{"role": "assistant", "content": "a", "image": DOG}], "in what the user says, got one of assistant"),
        ([{"role": "user", "content": "a", "image": "https://example.org/cat.png"}], "Download it"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refusals_say_what_to_do(processor: GLM4VProcessor, prompt: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        processor(prompt)


def test_refusals_say_which_prompt(processor: GLM4VProcessor) -> None:
    for bad in (["a", 3], [Path("missing.png")], [user("a", DOG)]):
        with pytest.raises((TypeError, ValueError, FileNotFoundError)) as caught:
            processor([["a"], [DOG], bad])
        assert caught.value.__notes__ == ["This is about prompt 2, counted from 0."]
    with pytest.raises(ValueError, match="images: expected one for each text, got 1 for 2"):
        processor(["a", "b"], [DOG])
