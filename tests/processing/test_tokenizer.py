"""The tokenizer's call, files and refusals, held to transformers on the same files."""

import json

import numpy as np
import pytest

from flax_vlm.processing.sentencepiece import SentencePieceModel, xlm_roberta_tokenizer
from flax_vlm.processing.tokenizer import Tokenizer

# tokenizer_config.json of BAAI/AltCLIP
ALTCLIP_CONFIG = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": True},
    "model_max_length": 512,
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "sp_model_kwargs": {},
    "special_tokens_map_file": None,
    "tokenizer_class": "XLMRobertaTokenizer",
    "unk_token": "<unk>",
}


@pytest.fixture
def tokenizer(xlm_roberta_dir) -> Tokenizer:
    (xlm_roberta_dir / "tokenizer_config.json").write_text(json.dumps(ALTCLIP_CONFIG))
    return Tokenizer.from_dir(xlm_roberta_dir)


def auto_tokenizer(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.torch
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 16},
        {"padding": "max_length", "max_length": 40, "truncation": True},
        {"padding": "max_length", "truncation": True, "pad_to_multiple_of": 128},
        {"padding": False, "truncation": True, "max_length": 2},
        {"padding": True, "truncation": True, "max_length": 9, "add_special_tokens": False},
        {"padding": True, "truncation": True},
    ],
    ids=str,
)
def test_call_equals_transformers(tokenizer, xlm_roberta_dir, hard_texts, options, side):
    theirs = auto_tokenizer(xlm_roberta_dir)
    theirs.padding_side = theirs.truncation_side = side
    tokenizer.padding_side = tokenizer.truncation_side = side
    texts = [*hard_texts, "word " * 600]
    expected = theirs(texts, return_tensors="np", **options)
    ours = tokenizer(texts, **options)
    assert list(ours) == ["input_ids", "attention_mask"]
    for name, array in ours.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, expected[name])
    assert tokenizer.batch_decode(ours["input_ids"]) == theirs.batch_decode(expected["input_ids"])
    skipped = tokenizer.batch_decode(ours["input_ids"], skip_special_tokens=True)
    assert skipped == theirs.batch_decode(expected["input_ids"], skip_special_tokens=True)


@pytest.mark.torch
@pytest.mark.parametrize("source", ["sentencepiece", "transformers"])
def test_saved_folder_gives_equal_ids_in_transformers(tokenizer, xlm_roberta_dir, tmp_path, hard_texts, source):
    if source == "transformers":
        auto_tokenizer(xlm_roberta_dir).save_pretrained(tmp_path / "theirs")
        tokenizer = Tokenizer.from_dir(tmp_path / "theirs")
    tokenizer.padding_side = "left"
    tokenizer.save(tmp_path / "ours")
    theirs, again = auto_tokenizer(tmp_path / "ours"), Tokenizer.from_dir(tmp_path / "ours")
    texts = [*hard_texts, "<s> a </s> <mask> <pad>", "a <mask> b"]
    expected = tokenizer(texts)
    assert theirs.model_max_length == again.model_max_length == 512
    assert again.config == json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    for result in (theirs(texts, padding=True, return_tensors="np"), again(texts)):
        assert set(result) == {"input_ids", "attention_mask"}
        np.testing.assert_array_equal(result["input_ids"], expected["input_ids"])
        np.testing.assert_array_equal(result["attention_mask"], expected["attention_mask"])


def test_special_tokens_and_defaults(tokenizer, xlm_roberta_dir):
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 512)
    (xlm_roberta_dir / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    bare = Tokenizer.from_dir(xlm_roberta_dir)
    assert (bare.pad_token_id, bare.model_max_length, len(bare)) == (1, None, 252)
    bare.backend.save(str(xlm_roberta_dir / "tokenizer.json"))
    (xlm_roberta_dir / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}, "eos_token": "</s>"}')
    mapped = Tokenizer.from_dir(xlm_roberta_dir)
    assert (mapped.pad_token_id, mapped.eos_token_id, mapped.bos_token_id) == (1, 2, None)


def test_settings_baked_into_tokenizer_json_are_dropped(xlm_roberta_dir, xlm_roberta_model):
    backend = xlm_roberta_tokenizer(SentencePieceModel.parse(xlm_roberta_model))
    backend.enable_truncation(5)
    backend.enable_padding(length=7)
    backend.save(str(xlm_roberta_dir / "tokenizer.json"))
    assert Tokenizer.from_dir(xlm_roberta_dir)("two cats sleep on the roof")["input_ids"].shape[1] > 7


def test_bare_llama_model_with_added_tokens(tmp_path, llama_model):
    (tmp_path / "tokenizer.model").write_bytes(llama_model)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 651, "<fake_token_around_image>": 650}')
    (tmp_path / "tokenizer_config.json").write_text('{"padding_side": "left", "pad_token": "<unk>"}')
    tokenizer = Tokenizer.from_dir(tmp_path)
    batch = tokenizer(["two cats<image>", "two"])
    assert batch["input_ids"][0, -1] == 651 and batch["input_ids"][1, 0] == tokenizer.pad_token_id == 0
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "two cats"
    assert tokenizer.decode(651) == "<image>"
    (tmp_path / "added_tokens.json").write_text('{"<image>": 700}')
    with pytest.raises(ValueError, match="expected id 700"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "one str or more"),
        (["a", 3], {}, r"\['int', 'str'\]"),
        (b"bytes", {}, "got bytes"),
        (["a", "a b c"], {"padding": False}, "padding=True"),
        ("a", {"padding": "longer"}, "'longer'"),
        ("a", {"truncation": "only_first"}, "'only_first'"),
        ("a", {"max_length": 4}, "does nothing"),
        ("a b c d e f", {"max_length": 3, "padding": "max_length"}, "truncation=True"),
        ("a", {"max_length": 1, "truncation": True}, "room for the special tokens"),
    ],
    ids=str,
)
def test_refusals_say_what_to_do(tokenizer, texts, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tokenizer(texts, **options)


def test_missing_pieces_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    bare = Tokenizer(tokenizer.backend, {})
    with pytest.raises(ValueError, match="pad_token"):
        bare(["a", "a b c"])
    with pytest.raises(ValueError, match="no model_max_length"):
        bare("a", truncation=True)
