"""`VLM.generate`: options and inputs by the names of transformers, in one call."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flax_vlm.generation import GenerationConfig, generate
from flax_vlm.pretrained import VLM
from flax_vlm.processing import Tokenizer
from tests.generation.test_stop_strings import word_tokenizer
from tests.generation.tiny import PAD, VOCAB, TinyDecoder, prompts, random_params

PROMPTS = prompts(5, 9, 2)
WIDTH = 9
OF_CHECKPOINT = GenerationConfig(
    pad_token_id=PAD, max_new_tokens=6, temperature=0.5, inherited=frozenset(["temperature"])
)


@cache
def vlm() -> VLM:
    model = TinyDecoder()
    processor = SimpleNamespace(tokenizer=Tokenizer(word_tokenizer(VOCAB), {}))
    return VLM(model, random_params(model), processor, OF_CHECKPOINT)


def test_options_go_before_those_of_the_checkpoint() -> None:
    out: Any = vlm().generate(**PROMPTS)
    expected = generate(vlm().model, vlm().params, PROMPTS, GenerationConfig(pad_token_id=PAD, max_new_tokens=6))
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    shorter: Any = vlm().generate(**PROMPTS, max_new_tokens=4, use_cache=True, return_dict_in_generate=True)
    np.testing.assert_array_equal(shorter.sequences, out.sequences[:, : WIDTH + 4])
    further: Any = vlm().generate(input_ids=np.full((3, 1), 7), cache=shorter.cache, max_new_tokens=2)
    assert further.sequences.shape == (3, 3)


def test_a_stream_is_text_and_has_the_output() -> None:
    whole: Any = vlm().generate(**PROMPTS)
    streamed: Any = vlm().generate(**PROMPTS, stream=True)
    texts = ["".join(row) for row in zip(*streamed, strict=True)]
    tokenizer = vlm().processor.tokenizer
    assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in whole.sequences[:, WIDTH:]]
    assert len(set(texts)) == 3
    np.testing.assert_array_equal(streamed.output.sequences, whole.sequences)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ValueError, match=r"cannot generate with typical_p=0\.9: not known here"):
        vlm().generate(**PROMPTS, typical_p=0.9)
    with pytest.raises(ValueError, match="TinyDecoder does not generate text: expected a model with a language head"):
        VLM(vlm().model, vlm().params).generate(**PROMPTS)
    with pytest.raises(ValueError, match=r"the checkpoint has no tokenizer\. Use flax_vlm\.generation\.stream"):
        VLM(vlm().model, vlm().params, None, OF_CHECKPOINT).generate(**PROMPTS, stream=True)
