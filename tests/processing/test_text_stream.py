"""Text that comes id by id: together it is what decode gives, and none of it comes later than it must."""

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from flax_vlm.processing import TextStream, Tokenizer
from flax_vlm.processing.sentencepiece import SentencePieceModel, llama_tokenizer, xlm_roberta_tokenizer


def byte_level(corpus: list[str]) -> Backend:
    """As GPT-2's and GLM-4's: a piece is any run of bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    return backend


@pytest.fixture(scope="session")
def tokenizers(llama_model, xlm_roberta_model, hard_texts) -> dict[str, Tokenizer]:
    backends = {
        "llama": llama_tokenizer(SentencePieceModel.parse(llama_model)),
        "xlm-roberta": xlm_roberta_tokenizer(SentencePieceModel.parse(xlm_roberta_model)),
        "byte level": byte_level(hard_texts),
    }
    for backend in backends.values():
        backend.add_special_tokens([AddedToken("<image>", normalized=False)])
        backend.add_tokens([AddedToken("<plain>", normalized=False)])
    return {name: Tokenizer(backend, {}) for name, backend in backends.items()}


def all_of(stream: TextStream, ids: list[int]) -> str:
    return "".join([stream.put(index) for index in ids]) + stream.end()


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("name", ["llama", "xlm-roberta", "byte level"])
@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_joined_it_is_what_decode_gives(tokenizers, name, skip_special_tokens, data):
    tokenizer = tokenizers[name]
    last = len(tokenizer) - 1  # ids of no piece too: a model may have more rows than its tokenizer
    index = st.one_of(st.integers(0, last + 3), st.integers(3, 258), st.sampled_from([0, 1, 2, last - 1, last]))
    ids = data.draw(st.lists(index, max_size=20))
    stream = TextStream(tokenizer, skip_special_tokens)
    expected = tokenizer.decode(ids, skip_special_tokens)
    assert all_of(stream, ids) == expected
    assert all_of(stream, ids) == expected, "the second text through one stream"


@pytest.mark.parametrize("name", ["llama", "xlm-roberta", "byte level"])
def test_text_comes_as_soon_as_it_is_certain(tokenizers, name, hard_texts):
    tokenizer, held = tokenizers[name], 0
    for text in hard_texts:
        stream, given = TextStream(tokenizer), ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][0]
        for i, index in enumerate(ids):
            given += stream.put(index)
            so_far = tokenizer.decode(ids[: i + 1], skip_special_tokens=True)
            piece = tokenizer.backend.id_to_token(int(index))
            if piece.startswith("<0x") or so_far.endswith("\ufffd"):
                held += so_far != given
            else:
                assert given == so_far
            assert "\ufffd" not in given
    assert held or name == "xlm-roberta", "texts of the test should have characters of several pieces"


def test_one_wrong_byte_changes_the_characters_before_it(tokenizers):
    """Why a run of byte pieces waits for its end, also behind its last whole character."""
    tokenizer = tokenizers["llama"]
    snowman, wrong = [3 + byte for byte in "☃".encode()], 3 + 0xFF
    stream, letter = TextStream(tokenizer), tokenizer.backend.token_to_id("x")
    assert [stream.put(index) for index in [*snowman, letter]] == ["", "", "", "☃x"]
    assert tokenizer.decode(snowman) == "☃" and all_of(TextStream(tokenizer), [*snowman, wrong]) == "\ufffd" * 4
    assert all_of(TextStream(tokenizer), [*snowman, tokenizer.backend.token_to_id("<image>"), wrong]) == "\ufffd" * 4
