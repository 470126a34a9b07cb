"""The IDEFICS processor against transformers' own, from the same folder: ids, masks and pixels."""

import io
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from flax_vlm.processing import IdeficsProcessor, Tokenizer
from flax_vlm.processing.idefics import image_attention_mask

ADDED = {"<fake_token_around_image>": 650, "<image>": 651, "<end_of_utterance>": 652}
SPECIAL = {
    "additional_special_tokens": list(ADDED),
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": {"content": "<unk>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
    "unk_token": "<unk>",
}
# That of idefics-9b, with smaller pictures.
PREPROCESSOR = {
    "image_num_channels": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "IdeficsImageProcessor",
    "image_size": 18,
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "IdeficsProcessor",
}
RNG = np.random.default_rng(0)
A, B, C = (Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in [(60, 90), (33, 20), (18, 18)])
BATCHES = {
    "ragged": [
        ["User:", A, "two cats\nAssistant: a cat</s> and", B, C, "  \n sleep "],
        ["no picture", "at all"],
        [A],
        [],
    ],
    "one prompt": ["User: hi ", A, B, " who?", "Größe ☃ ", " <end_of_utterance>", "\nAssistant:"],
    "pictures first and last": [[A, B, C], [C, "x", A]],
    "text only": [["two cats", "on the roof"], ["3 dogs"]],
    "tuples": (("a", A), ("b",)),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, llama_model):
    """A checkpoint of 2023: a sentencepiece model, its added tokens beside it."""
    folder = tmp_path_factory.mktemp("idefics")
    (folder / "tokenizer.model").write_bytes(llama_model)
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": 1} | ADDED))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048}')
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def processor(folder) -> IdeficsProcessor:
    return IdeficsProcessor.from_dir(folder)


@pytest.fixture(scope="session")
def reference(folder, processor, tmp_path_factory):
    """transformers' processor with its Pillow backend; called with the names that its release 5.23 has."""
    transformers = pytest.importorskip("transformers")
    images = pytest.importorskip("transformers.models.idefics.image_processing_pil_idefics")
    saved = tmp_path_factory.mktemp("saved")
    processor.tokenizer.save(saved)
    return transformers.IdeficsProcessor(
        images.IdeficsImageProcessorPil.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(saved)
    )


def assert_equal(ours: dict, theirs) -> None:
    assert set(ours) == set(theirs)
    for name in ours.keys() - {"pixel_values"}:
        assert ours[name].dtype == np.int32
        np.testing.assert_array_equal(ours[name], theirs[name].numpy(), err_msg=name)
    assert ours["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"].numpy().transpose(0, 1, 3, 4, 2))


@pytest.mark.torch
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("end_of_utterance", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_transformers(processor, reference, batch, side, end_of_utterance, eos):
    options = {"padding_side": side, "add_eos_token": eos, "add_end_of_utterance_token": end_of_utterance}
    assert_equal(processor(BATCHES[batch], dummy_image=True, **options), reference(text=BATCHES[batch], **options))


ITEMS = st.one_of(
    st.sampled_from([A, B, C]),
    st.sampled_from(["two cats", " a ", "", "\n", "</s>", "x</s> y", "<end_of_utterance>", "Größe 42", "☃</s></s>猫"]),
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda text: "://" not in text),
)


@pytest.mark.torch
@hypothesis.settings(max_examples=150)
@hypothesis.given(
    batch=st.lists(st.lists(ITEMS, max_size=6), min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {
            "padding_side": st.sampled_from(["left", "right"]),
            "add_eos_token": st.booleans(),
            "add_end_of_utterance_token": st.booleans(),
        }
    ),
    width=st.one_of(
        st.fixed_dictionaries({"truncation": st.just(True), "max_length": st.integers(1, 12)}),
        st.sampled_from([{}, {"pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 150}]),
    ),
)
def test_equals_transformers_on_any_prompts(processor, reference, batch, options, width):
    assert_equal(processor(batch, dummy_image=True, **options, **width), reference(text=batch, **options, **width))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("who?", A),
        (["who?", "and who?"], [A, B]),
        (["who?", "and who?", ""], [[A, B], [C], []]),
        ("who?", [[A, B]]),
    ],
)
def test_images_beside_texts_equal_transformers(processor, reference, text, images):
    assert_equal(processor(text, images, add_end_of_utterance_token=False), reference(images=images, text=text))


def mode(name: str) -> Image.Image:
    return A.quantize(7) if name == "P" else A.convert(name)


def transparent() -> dict[str, Image.Image]:
    alpha = Image.fromarray(RNG.integers(0, 256, (60, 90), dtype=np.uint8))
    coloured, gray, buffer = A.copy(), A.convert("L"), io.BytesIO()
    coloured.putalpha(alpha)
    gray.putalpha(alpha)
    mode("P").save(buffer, "PNG", transparency=3)
    return {"RGBA": coloured, "LA": gray, "P with transparency": Image.open(buffer)}


@pytest.mark.torch
def test_pictures_of_every_mode_equal_transformers(processor, reference):
    pictures = {name: mode(name) for name in ("1", "L", "P", "CMYK", "YCbCr", "HSV")} | transparent()
    prompt = [*pictures.values(), np.asarray(B)]
    ours, theirs = processor(prompt), reference(text=prompt)
    assert ours["pixel_values"].shape == (1, 10, 18, 18, 3)
    assert_equal(ours, theirs)


@pytest.mark.torch
def test_16_bit_gray_is_read_by_its_upper_byte(processor, reference):
    """transformers would turn all above 255 white."""
    deep = RNG.integers(0, 65536, (40, 30), dtype=np.uint16)
    ours = processor([Image.fromarray(deep)])
    np.testing.assert_array_equal(ours["pixel_values"], processor([(deep >> 8).astype(np.uint8)])["pixel_values"])
    assert_equal(ours, reference(text=[Image.fromarray((deep >> 8).astype(np.uint8))]))


def test_every_source_of_a_picture_gives_the_same(processor, tmp_path):
    path = tmp_path / "a.png"
    A.save(path)
    chat = [{"role": "user", "content": [{"type": "image", key: str(path)} for key in ("image", "path", "url")]}]
    expected = processor([A])["pixel_values"][0, 0]
    for prompt in ([A, np.asarray(A), path, path.read_bytes()], chat):
        for pixels in processor(prompt)["pixel_values"][0]:
            np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(processor("who?", str(path))["pixel_values"][0, 0], expected)


@pytest.mark.torch
@pytest.mark.parametrize("saved_by", ["us", "transformers"])
def test_saved_folders(processor, reference, tmp_path, saved_by):
    if saved_by == "us":
        processor.save(tmp_path)
        reference = pytest.importorskip("transformers").IdeficsProcessor.from_pretrained(tmp_path, use_fast=False)
        config = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert config.items() >= (PREPROCESSOR | {"size": {"height": 18, "width": 18}}).items()
    else:
        reference.save_pretrained(tmp_path)
    again = IdeficsProcessor.from_dir(tmp_path)
    assert again.image_processor == processor.image_processor
    batch = BATCHES["ragged"]
    assert_equal(again(batch, add_end_of_utterance_token=False), reference(text=batch, return_tensors="pt"))
    for name, array in again(batch).items():  # with what was found about <end_of_utterance>
        np.testing.assert_array_equal(array, processor(batch)[name])


def test_layout_equals_sentencepiece_between_the_special_tokens(processor, llama_model):
    """What the slow LLaMA tokenizer of transformers 4.40 gives: each stretch of text by itself."""
    pieces = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=llama_model)
    fake, image, end = ADDED.values()
    out = processor([["two cats ", A, B, " on\n", "the roof"], ["猫"]], add_eos_token=True)
    expected = [1, *pieces.encode("two cats"), fake, image, fake, image, fake, *pieces.encode("on\n"), end]
    expected += [*pieces.encode("the roof"), 2]
    short = [1, *pieces.encode("猫"), 2]
    assert out["input_ids"].tolist() == [expected, [0] * (len(expected) - len(short)) + short]
    assert out["attention_mask"][1].tolist() == [0] * (len(expected) - len(short)) + [1] * len(short)


def test_image_attention_mask_by_hand():
    s, end, image, fake, a = 1, 2, 651, 650, 9
    ids = np.array([[0, s, a, fake, image, fake, image, fake, a, end, a, end, a, fake, image, a, end, image]])
    seen = ["-", "-", "-", "-", 0, 0, 1, 1, 1, 1, "-", "-", "-", "-", 2, 2, 2, 3]
    for images in (1, 2, 4, 5):
        mask = image_attention_mask(ids, image, end, images)
        assert mask.shape == (1, 18, images)
        assert mask[0].tolist() == [[int(i == latest) for i in range(images)] for latest in seen]
    assert image_attention_mask(ids, image, None, 3)[0, 10].tolist() == [0, 1, 0]


def test_text_alone_brings_no_pictures(processor):
    assert processor(["two cats", "on the roof"]).keys() == {"input_ids", "attention_mask"}
    dummy = processor([["two cats"], ["a"]], dummy_image=True)
    assert dummy["pixel_values"].shape == (2, 1, 18, 18, 3) and not dummy["pixel_values"].any()
    assert dummy["image_attention_mask"].shape == (*dummy["input_ids"].shape, 1)
    assert not dummy["image_attention_mask"].any()
    np.testing.assert_array_equal(processor("two cats")["input_ids"], processor(["two cats"])["input_ids"])


def test_numbers_of_pictures_are_rounded_up(processor):
    batch = [["a", A, B, "b", C], [B], ["b"]]
    plain, rounded = processor(batch), processor(batch, pad_images_to_multiple_of=2)
    assert rounded["pixel_values"].shape == (3, 4, 18, 18, 3) and not rounded["pixel_values"][:, 3].any()
    assert not rounded["image_attention_mask"][..., 3].any()
    for name in ("pixel_values", "image_attention_mask"):
        axis = 1 if name == "pixel_values" else 2
        np.testing.assert_array_equal(np.take(rounded[name], range(3), axis), plain[name])
    assert "pixel_values" not in processor(["b"], pad_images_to_multiple_of=2)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"additional_special_tokens": list(ADDED)}, True),
        ({"additional_special_tokens": [{"content": "<end_of_utterance>"}]}, True),
        ({"extra_special_tokens": list(ADDED)}, True),
        ({"extra_special_tokens": {"end_token": "<end_of_utterance>"}}, True),
        ({"additional_special_tokens": list(ADDED)[:2]}, False),
        ({}, False),
    ],
    ids=str,
)
def test_end_of_utterance_is_found_in_the_special_tokens(processor, special, expected):
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"} | special
    ours = IdeficsProcessor(processor.image_processor, Tokenizer(processor.tokenizer.backend, config))
    batch = [["a", "b"], ["a", A, "b"]]
    assert (ours(batch)["input_ids"] == 652).sum(-1).tolist() == [expected, 0]
    assert (ours(batch, add_end_of_utterance_token=not expected)["input_ids"] == 652).sum() == (not expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pictures_go_with_the_tokens_that_are_cut_off(folder, side):
    processor = IdeficsProcessor.from_dir(folder)
    processor.tokenizer.truncation_side = side
    whole = processor([["a", A, B, C]])
    out = processor([["a", A, B, C]], truncation=True, max_length=5)
    kept = [C] if side == "left" else [A]
    assert (out["input_ids"] == 651).sum() == (2 if side == "left" else 1)
    if side == "left":  # image fake image fake
        kept = [B, C]
    pixels = processor([kept])["pixel_values"][0]
    np.testing.assert_array_equal(out["pixel_values"][0, : len(kept)], pixels)
    assert out["pixel_values"].shape == whole["pixel_values"].shape
    assert not out["pixel_values"][0, len(kept) :].any()
    assert not out["image_attention_mask"][..., len(kept) :].any()


def test_transform_stands_in_for_the_image_processor(processor):
    seen = []

    def transform(image: Image.Image) -> np.ndarray:
        seen.append(image.mode)
        return np.full((4, 6, 3), len(seen), np.float64)

    pixels = processor([[A, mode("L")], [B]], transform=transform)["pixel_values"]
    assert seen == ["RGB"] * 3 and pixels.dtype == np.float32
    assert pixels[..., 0, 0, 0].tolist() == [[1, 2], [3, 0]] and pixels.shape == (2, 2, 4, 6, 3)
    with pytest.raises(ValueError, match=r"transform: expected .* channels last, got \(3, 4, 6\)"):
        processor([A], transform=lambda image: np.zeros((3, 4, 6)))
    with pytest.raises(ValueError, match="of one size"):
        processor([A, B], transform=np.asarray)


def test_decode(processor):
    ids = processor([["two cats", A, "on the roof"], ["猫"]])["input_ids"]
    assert processor.batch_decode(ids) == ["two cats on the roof", "猫"]
    assert processor.decode(ids[1]) == "猫"
    assert "<image>" in processor.decode(ids[0], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({}, 224),
        ({"image_size": 30}, 30),
        ({"image_size": 30, "size": {"height": 9, "width": 9}}, 30),
        ({"size": {"height": 9, "width": 9}, "image_processor_type": "IdeficsImageProcessorFast"}, 9),
        ({"size": 9}, 9),
    ],
    ids=str,
)
def test_sizes_in_configs_of_every_release(folder, tmp_path, config, size):
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"do_resize": True} | config}))
    (tmp_path / "added_tokens.json").write_text(json.dumps(ADDED))
    processor = IdeficsProcessor.from_dir(tmp_path)
    assert processor([A])["pixel_values"].shape == (1, 1, size, size, 3)
    assert processor.tokenizer.padding_side == "left"
