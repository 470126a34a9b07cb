"""Stop strings: found when, and only when, the text has come to hold one."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from flax_vlm.generation.stop_strings import stop_states, stop_table, token_bytes

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word_tokenizer(size: int) -> tokenizers.Tokenizer:
    """Tokens of one to three letters, which its texts put side by side."""
    words = [*LETTERS]
    words += [a + b for a in "aeiou" for b in "nrst"] + [a + b + a for a in "st" for b in "aeiou"]
    words = [*words[: size - 1], "<unk>"]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = []
    for pair in (("a", "b"), ("Ġ", "a"), ("Ã", "¤"), ("ab", "ab")):
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def llama_tokenizer() -> tokenizers.Tokenizer:
    """As sentencepiece models of the LLaMA family decode: ▁ is a space, <0x..> a byte."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ["▁", "a", "b", "▁a", "▁ab", "ab", "ä", "\n", "b▁a"]:
        vocab[piece] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


TOKENIZERS = {"words": word_tokenizer(50), "byte level": byte_level_tokenizer(), "byte fallback": llama_tokenizer()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_as_bytes_make_up_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    texts = token_bytes(tokenizer)
    ids = tokenizer.encode("ab abä\n", add_special_tokens=False).ids if name != "words" else [3, 30, 7]
    assert len(texts) == tokenizer.get_vocab_size()
    assert b"".join(texts[i] for i in ids).decode().strip() == tokenizer.decode(ids).strip()
    for special in ("<|end|>", "</s>"):
        if (i := tokenizer.token_to_id(special)) is not None:
            assert texts[i] == special.encode()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_found_when_the_text_has_come_to_hold_one(name: str, data: st.DataObject) -> None:
    texts = token_bytes(TOKENIZERS[name])
    ids = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=12))
    likely = b"".join(texts[i] for i in ids).decode(errors="ignore") or "a"
    begin = data.draw(st.integers(0, len(likely) - 1))
    part = likely[begin : begin + data.draw(st.integers(1, 5))]
    strings = data.draw(st.lists(st.sampled_from([part, "ab", "ba b", "ä", "\n\n", "s"]), min_size=1, max_size=3))
    split = data.draw(st.integers(0, len(ids) - 1))

    table = stop_table(TOKENIZERS[name], tuple(strings))
    (state,) = stop_states(table, np.array([ids[:split]], int).reshape(1, -1), np.ones((1, split), bool))
    for end in range(split, len(ids)):
        packed = int(table[state, ids[end]])
        state = packed >> 1
        before, now = (b"".join(texts[i] for i in ids[:n]) for n in (end, end + 1))
        found = any(now.count(s.encode()) and now.rfind(s.encode()) + len(s.encode()) > len(before) for s in strings)
        assert bool(packed & 1) == found


def test_padding_is_no_text_and_unknown_ids_match_nothing() -> None:
    tokenizer = TOKENIZERS["words"]
    table = stop_table(tokenizer, ("ab",))
    a, b = (tokenizer.token_to_id(letter) for letter in "ab")
    ids, mask = np.array([[a, b], [a, a]]), np.array([[1, 0], [0, 1]]).astype(bool)
    begun = stop_states(table, ids, mask)
    assert (table[begun, b] & 1).tolist() == [1, 1]
    unknown = table.shape[1] - 1
    assert (table[begun, unknown] == 0).all()


def test_the_table_is_made_once() -> None:
    tokenizer = TOKENIZERS["words"]
    assert stop_table(tokenizer, ("ab",)) is stop_table(tokenizer, ("ab",))
    with pytest.raises(TypeError, match="expected one of the tokenizers library, got str"):
        stop_table("bert-base", ("ab",))
