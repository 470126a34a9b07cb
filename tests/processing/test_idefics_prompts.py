"""Chats in the layout of the instruct models, and what the IDEFICS processor refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_vlm.processing import IdeficsProcessor, ImageProcessor

ADDED = {"<fake_token_around_image>": 650, "<image>": 651, "<end_of_utterance>": 652}
DOG, CAT = (Image.new("RGB", (20, 10), colour) for colour in ("brown", "gray"))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, llama_model):
    folder = tmp_path_factory.mktemp("base")
    (folder / "tokenizer.model").write_bytes(llama_model)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<unk>"}')
    (folder / "preprocessor_config.json").write_text('{"image_size": 18}')
    return folder


@pytest.fixture(scope="module")
def processor(base_folder):
    (base_folder / "added_tokens.json").write_text(json.dumps(ADDED))
    processor = IdeficsProcessor.from_dir(base_folder)
    processor.tokenizer.config["additional_special_tokens"] = list(ADDED)
    return processor


def user(*content: str | Image.Image) -> dict:
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in content]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CHATS = {
    # The model card of idefics-9b-instruct, but for the pictures.
    "model card": (
        [
            user("What is in this image?", DOG),
            assistant("This picture depicts Idefix, the dog of Obelix. Idefix is running on the ground."),
            user(CAT, "And who is that?"),
        ],
        True,
        [
            "User: What is in this image?",
            DOG,
            "<end_of_utterance>",
            "\nAssistant: This picture depicts Idefix, the dog of Obelix. Idefix is running on the ground."
            "<end_of_utterance>",
            "\nUser:",
            CAT,
            "And who is that?<end_of_utterance>",
            "\nAssistant:",
        ],
    ),
    # The start of its demo.
    "system": (
        [
            {"role": "system", "content": "A conversation.\n\nThe conversation begins:"},
            user(DOG, "Describe this image."),
            assistant("A dog."),
        ],
        False,
        [
            "A conversation.\n\nThe conversation begins:",
            "\nUser:",
            DOG,
            "Describe this image.<end_of_utterance>",
            "\nAssistant: A dog.<end_of_utterance>",
        ],
    ),
    "several of a kind": (
        [user("One", " and ", "two:", DOG, CAT, " which? "), {"role": "user", "content": " Hm.  "}],
        True,
        [
            "User: One and two:",
            DOG,
            CAT,
            "which?<end_of_utterance>",
            "\nUser: Hm.<end_of_utterance>",
            "\nAssistant:",
        ],
    ),
    "an address is text": (
        [user(DOG, "https://example.org/")],
        False,
        ["User:", DOG, "https:", "//example.org/<end_of_utterance>"],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_laid_out_as_the_models_were_tuned(processor, name):
    chat, add_generation_prompt, prompt = CHATS[name]
    ours = processor([chat, chat[:1]], add_generation_prompt=add_generation_prompt)
    by_hand = processor(prompt, add_end_of_utterance_token=False)
    assert ours["attention_mask"][0].all()
    for key, array in by_hand.items():
        np.testing.assert_array_equal(ours[key][0], array[0], err_msg=key)
    alone = processor(chat, add_generation_prompt=add_generation_prompt, add_end_of_utterance_token=True)
    np.testing.assert_array_equal(alone["input_ids"], by_hand["input_ids"])


def test_files_decide_what_a_base_model_takes(base_folder, tmp_path):
    """Without <end_of_utterance> in the vocabulary there is no chat, without the others no picture."""
    for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((base_folder / name).read_bytes())
    bare = IdeficsProcessor.from_dir(tmp_path)
    assert bare("two cats").keys() == {"input_ids", "attention_mask"}
    for prompt in ([DOG], [user("hi")], ["a<end_of_utterance>"]):
        with pytest.raises(ValueError, match=r"expected the tokens \['<.*got a vocabulary without them"):
            bare(prompt)
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: ADDED[name] for name in list(ADDED)[:2]}))
    base = IdeficsProcessor.from_dir(tmp_path)
    assert (base(["a", DOG, "b", "c"])["input_ids"] == 651).sum() == 1
    with pytest.raises(ValueError, match=r"\['<end_of_utterance>'\].*chats need an instruct model"):
        base(["a", DOG, "b", "c"], add_end_of_utterance_token=True)


def test_missing_files_are_named(base_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        IdeficsProcessor.from_dir(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_size": 18}')
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        IdeficsProcessor.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "got an empty list"),
        (DOG, "a prompt or a list of prompts, got Image"),
        ([["a"], "b"], "lists beside other things"),
        (["a", 3], "texts and pictures .* got int"),
        (["a", None], "got NoneType"),
        (["a", "https://example.org/cat.png "], r"address https://example.org/cat\.png. Download it"),
        (["a", np.zeros((3, 8, 9), np.uint8)], "channels first: pass x.transpose"),
        (["a", np.zeros((2, 8, 9, 3), np.uint8)], "Pass one array per picture"),
        (["a", np.zeros((8, 9, 3), np.float32)], "got float32"),
        (["a", Path("missing.png")], "missing.png"),
        (["a", b"not a picture"], "got 13 bytes"),
        (["a <image> b"], "got <image> in a text"),
        ([user("a"), "b"], "chat: expected messages"),
        ([{"role": "tool", "content": "a"}], "'tool'"),
        ([user("a"), {"role": "system", "content": "b"}], 'before them perhaps one of "system"'),
        ([{"role": "user"}], "chat: expected messages"),
        ([{"role": "user", "content": ["a"]}], "as content, got 'a'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "as content, got {'type': 'image'}"),
        ([user("<image>")], "got <image> in a text"),
        ([{"role": "user", "content": [{"type": "image", "url": "https://example.org/cat.png"}]}], "Download it"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # a picture prints its address
)
def test_refusals_say_what_to_do(processor, prompts, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        processor(prompts)


def test_refusals_say_which_prompt(processor):
    for bad in (3, Path("missing.png")):
        with pytest.raises((TypeError, FileNotFoundError)) as caught:
            processor([["a"], [DOG], ["a", bad]])
        assert caught.value.__notes__ == ["This is about prompt 2, counted from 0."]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a", DOG], DOG), {}, "Put pictures in text or in images"),
        ((["a", "b"], [DOG]), {}, "got 1 for 2"),
        (([], []), {}, "got 0 for 0"),
        (("a", "https://example.org/cat.png"), {}, "Download it"),
        ((["a"],), {"add_generation_prompt": True}, "expected a chat, got a list"),
        ((["a"],), {"padding_side": "middle"}, 'padding_side: expected "left" or "right"'),
    ],
)
def test_refusals_of_options(processor, arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        processor(*arguments, **options)


def test_a_tokenizer_without_a_start_is_refused(processor):
    bare = type(processor.tokenizer)(processor.tokenizer.backend, {"pad_token": "<unk>"})
    with pytest.raises(ValueError, match="bos_token: expected a token of the vocabulary, got None"):
        IdeficsProcessor(processor.image_processor, bare)("a")


def test_other_image_processors_are_refused():
    for config in ({"image_num_channels": 4}, {"size": {"shortest_edge": 9}}):
        with pytest.raises(ValueError, match="expected"):
            ImageProcessor.from_hf({"image_processor_type": "IdeficsImageProcessor"} | config)
    oblong = ImageProcessor(size={"height": 8, "width": 9}, do_center_crop=False)
    assert ImageProcessor.from_hf(oblong.to_hf("IdeficsImageProcessor")) == oblong
