"""tiktoken's files read without the tiktoken package, held to it: ids, bytes and texts."""

import base64
import json
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tiktoken
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from flax_vlm.generation.stop_strings import token_bytes
from flax_vlm.processing import TextStream, Tokenizer
from flax_vlm.processing.byte_pairs import GLM4_PATTERN, byte_letters, glm4_tokenizer, read_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "glm4v" / "tokenizer"
Ranks = dict[bytes, int]
BYTES = [bytes([byte]) for byte in range(256)]
# Where one regular expression engine might see letters, digits, spaces or cases that another does not.
SEAMS = ["'S", "'ſ", "it'LL", "ß", "İ", "ﬀ", "K", "Ⅷ", "½", "²", "٣٤٥٦", "1234567", "\x1c", "\x85", "\u180e", "\u200b"]
SEAMS += [
    "\u3000 x",
    "\r\n \n",
    " \t x",
    "a  \n  b",
    "x \r",
    "!!\n\n",
    "e\u0301\u0302",
    "\U0001f9d1\u200d",
    "\U00031350",
]


def numbered(tokens: Iterable[bytes]) -> Ranks:
    return {token: rank for rank, token in enumerate(tokens)}


@cache
def trained(corpus: tuple[str, ...]) -> Ranks:
    """A vocabulary as trainers make it: a token's parts are tokens of lower rank."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(GLM4_PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*corpus, " " * 40, "=" * 70, "\n" * 9] * 3, trainer)
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    by_id = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return numbered(bytes(bytes_of[letter] for letter in token) for token, _ in by_id)


def made_up(letters: str, seed: int) -> Ranks:
    """Any tokens in any order, also such as no training would find."""
    rng = random.Random(seed)
    tokens = {"".join(rng.choices(letters, k=rng.randrange(2, 7))).encode() for _ in range(rng.randrange(4, 25))}
    return numbered([*BYTES, *rng.sample(sorted(tokens), len(tokens))])


def theirs(ranks: Ranks, special: dict[str, int] | None = None) -> tiktoken.Encoding:
    return tiktoken.Encoding("glm4", pat_str=GLM4_PATTERN, mergeable_ranks=ranks, special_tokens=special or {})


def ours(ranks: Ranks) -> Tokenizer:
    return Tokenizer(glm4_tokenizer(ranks, {"[gMASK]": len(ranks), "<sop>": len(ranks) + 1}), {})


def assert_equal(ranks: Ranks, texts: Iterable[str]) -> None:
    expected, got = theirs(ranks), ours(ranks)
    for text in texts:
        ids = expected.encode_ordinary(text)
        assert got.ordinary_ids(text) == ids, repr(text)
        assert got.backend.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert got.decode(ids) == text


@pytest.mark.parametrize("vocabulary", ["golden", "trained"])
def test_ids_equal_tiktoken(vocabulary: str, hard_texts: list[str]) -> None:
    ranks = read_ranks(GOLDEN / "tokenizer.model") if vocabulary == "golden" else trained(tuple(hard_texts))
    rng = random.Random(0)
    words = [word for token in ranks if (word := token.decode(errors="ignore"))] + SEAMS
    characters = [chr(point) for point in range(0x20, 0x30000) if not 0xD800 <= point < 0xE000]
    pieces = (
        rng.choices(words, k=12) + rng.choices(characters, k=6) + rng.choices(hard_texts, k=1) for _ in range(600)
    )
    mixed = ["".join(rng.sample(some, rng.randrange(1, len(some)))) for some in pieces]
    runs = [unit * count for unit in (" ", "=", "\n", "a", "ab", "猫", " \n") for count in range(1, 90)]
    assert_equal(ranks, [*hard_texts, *SEAMS, *mixed, *runs])


@pytest.mark.parametrize("letters", ["a", "ab", "abc"])
def test_ids_equal_tiktoken_in_vocabularies_that_nobody_trained(letters: str) -> None:
    """Pairs of one union, pairs that overlap, unions of lower rank than their parts."""
    rng = random.Random(0)
    for seed in range(40):
        texts = ["".join(rng.choices(letters, k=rng.randrange(1, 40))) for _ in range(40)]
        assert_equal(made_up(letters, seed), texts)


def test_special_tokens_are_found_in_texts_unless_told_otherwise() -> None:
    ranks, tokenizer = read_ranks(GOLDEN / "tokenizer.model"), Tokenizer.from_dir(GOLDEN)
    added = json.loads((GOLDEN / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    expected = theirs(ranks, {token["content"]: int(index) for index, token in added.items()})
    for text in ("[gMASK]<sop><|user|>\nhi <|endoftext|> ", "a [MASK]<|end_of_video|>", "<|USER|>"):
        found = tokenizer(text, add_special_tokens=False)["input_ids"][0].tolist()
        assert found == expected.encode(text, allowed_special="all")
        assert tokenizer(text)["input_ids"][0].tolist() == [402, 404, *found]
        assert tokenizer.ordinary_ids(text) == expected.encode_ordinary(text)
    assert tokenizer.ordinary_ids("") == []


@hypothesis.settings(max_examples=200)
@hypothesis.given(ids=st.lists(st.integers(0, 413), max_size=24))
def test_texts_equal_tiktoken_also_in_pieces(ids: list[int]) -> None:
    tokenizer, encoding = golden()
    ordinary = [index for index in ids if index < 400]
    expected = encoding.decode_bytes(ordinary).decode(errors="replace")
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected
    stream = TextStream(tokenizer)
    assert "".join([stream.put(index) for index in ids]) + stream.end() == expected


@cache
def golden() -> tuple[Tokenizer, tiktoken.Encoding]:
    return Tokenizer.from_dir(GOLDEN), theirs(read_ranks(GOLDEN / "tokenizer.model"))


def test_bytes_of_tokens_are_known_to_stop_strings() -> None:
    ranks, tokenizer = read_ranks(GOLDEN / "tokenizer.model"), golden()[0]
    assert token_bytes(tokenizer.backend)[:400] == sorted(ranks, key=ranks.__getitem__)
    assert len(tokenizer) == 414 and tokenizer.pad_token_id == tokenizer.eos_token_id == 400
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 8192)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-7] + lines[-6:], r"all 256 bytes among them, got 399 tokens up to rank 399"),
        (lambda lines: lines[1:], "Is the file complete"),
        (lambda lines: [*lines, b"IQ== 400"], "got 400 tokens up to rank 400"),  # "!" once more
        (lambda lines: [*lines, b"I!Q= 400"], "a token in base64 and its rank"),
        (lambda lines: [*lines, b"AAAA"], "a token in base64 and its rank"),
        (lambda lines: [*lines, b"AAAA x"], "a token in base64 and its rank"),
        (lambda lines: [b"\x0a\x0e\x0a\x05<unk>"], "a token in base64 and its rank"),
        (lambda lines: [], "got 0 tokens up to rank None"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    lines = (GOLDEN / "tokenizer.model").read_bytes().splitlines()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(damage(lines)))
    with pytest.raises(ValueError, match=rf"tokenizer\.model: .*{message}"):
        read_ranks(tmp_path / "tokenizer.model")


def test_special_tokens_have_to_come_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLM4Tokenizer"}')
    with pytest.raises(ValueError, match=r"the tokens \['\[gMASK\]', '<sop>'\] among the added ones, got \[\]"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # then it is taken for LLaMA's
    with pytest.raises(ValueError, match="expected a sentencepiece model"):
        Tokenizer.from_dir(tmp_path)


def test_ranks_in_any_order_of_lines(tmp_path: Path) -> None:
    ranks = read_ranks(GOLDEN / "tokenizer.model")
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"\r\n".join(np.random.default_rng(0).permutation(lines).tolist()))
    shuffled = read_ranks(tmp_path / "tokenizer.model")
    assert shuffled == ranks and list(shuffled) != list(ranks)
    assert ours(shuffled).ordinary_ids("hello world") == ours(ranks).ordinary_ids("hello world")
