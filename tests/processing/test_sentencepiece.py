"""Sentencepiece models read without the sentencepiece package, held to it and to transformers."""

import dataclasses
import random
import unicodedata

import pytest

from flax_vlm.processing.sentencepiece import SentencePieceModel, llama_tokenizer, xlm_roberta_tokenizer


def processor(data: bytes):
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=data)


def random_texts(hard_texts: list[str], count: int) -> list[str]:
    """Words and single characters in a row; a combining mark only where a word has it, not on any letter."""
    rng = random.Random(0)
    characters = sorted(c for c in set("".join(hard_texts)) if unicodedata.category(c) not in ("Mn", "Mc", "Cf"))
    words = [word for text in hard_texts for word in text.split()]
    lengths = [rng.randrange(1, 30) for _ in range(count)]
    return ["".join(rng.choice(rng.choice([characters, words])) for _ in range(length)) for length in lengths]


def test_pieces_and_settings_equal_the_package(xlm_roberta_model, llama_model):
    for data, byte_fallback in ((xlm_roberta_model, False), (llama_model, True)):
        theirs, ours = processor(data), SentencePieceModel.parse(data)
        for i in range(len(theirs)):
            assert (ours.pieces[i].text, ours.pieces[i].score) == (theirs.id_to_piece(i), theirs.get_score(i))
        assert len(ours.pieces) == len(theirs)
        assert (ours.byte_fallback, ours.remove_extra_whitespaces) == (byte_fallback, not byte_fallback)


def test_xlm_roberta_equals_sentencepiece_shifted_by_one(xlm_roberta_model, hard_texts):
    theirs, ours = processor(xlm_roberta_model), xlm_roberta_tokenizer(SentencePieceModel.parse(xlm_roberta_model))
    for text in hard_texts + random_texts(hard_texts, 500):
        ids = [3 if i == 0 else i + 1 for i in theirs.encode(text)]
        assert ours.encode(text).ids == [0, *ids, 2], repr(text)


@pytest.mark.torch
def test_xlm_roberta_equals_transformers(xlm_roberta_dir, xlm_roberta_model, hard_texts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.XLMRobertaTokenizer.from_pretrained(xlm_roberta_dir)
    ours = xlm_roberta_tokenizer(SentencePieceModel.parse(xlm_roberta_model))
    assert ours.get_vocab() == theirs.get_vocab()
    special = ["<s> a </s> <mask> <pad> <unk>", "a<mask>b", " <mask> x", "a\u0300\u0301\u0302b", "，\u0305"]
    for text in hard_texts + special + random_texts(hard_texts, 500):
        assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)
    assert ours.encode("two", "cats").ids == theirs("two", "cats")["input_ids"]


def test_llama_equals_sentencepiece(llama_model, hard_texts):
    theirs, ours = processor(llama_model), llama_tokenizer(SentencePieceModel.parse(llama_model))
    for text in hard_texts + random_texts(hard_texts, 500):
        ids = theirs.encode(text)
        assert ours.encode(text).ids == [1, *ids], repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)


def test_user_defined_pieces_are_found_in_text(train):
    data = train(vocab_size=252, user_defined_symbols=["<sep>", "<image>"])
    theirs, ours = processor(data), xlm_roberta_tokenizer(SentencePieceModel.parse(data))
    assert ours.token_to_id("<image>") == theirs.piece_to_id("<image>") + 1
    assert ours.encode("cats<image>dog").ids.count(ours.token_to_id("<image>")) == 1


def test_other_files_are_refused(tmp_path, xlm_roberta_model, llama_model):
    for name, data in {"cut": xlm_roberta_model[:-7], "text": b"IQ== 0\nIg== 1\n", "zip": b"PK\x03\x04" * 50}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="sentencepiece model"):
            xlm_roberta_tokenizer(SentencePieceModel.read(tmp_path / name))
    model = SentencePieceModel.parse(xlm_roberta_model)
    with pytest.raises(ValueError, match="LLaMA expected"):
        llama_tokenizer(model)
    with pytest.raises(ValueError, match="XLM-R expected"):
        xlm_roberta_tokenizer(SentencePieceModel.parse(llama_model))
    with pytest.raises(ValueError, match="add_dummy_prefix"):
        xlm_roberta_tokenizer(dataclasses.replace(model, add_dummy_prefix=False))
