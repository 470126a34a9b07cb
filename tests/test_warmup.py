"""`VLM.warmup`: the call that it is for compiles nothing."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from flax_vlm.generation import GenerationConfig
from flax_vlm.models.altclip import AltCLIPModel
from flax_vlm.pretrained import VLM
from flax_vlm.processing import Tokenizer
from tests.generation.test_stop_strings import word_tokenizer
from tests.generation.tiny import PAD, VOCAB, TinyDecoder, prompts, random_params
from tests.parity import altclip_cases as cases


def decoder(width: int) -> Any:
    """Of a width that no other test has: programs are found again by the model."""
    model = TinyDecoder(width=width)
    processor = SimpleNamespace(tokenizer=Tokenizer(word_tokenizer(VOCAB), {}))
    return VLM(model, random_params(model), processor, GenerationConfig(pad_token_id=PAD, max_new_tokens=6))


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}, {"num_beams": 3}, {"return_dict_in_generate": True}],
    ids=["greedy", "sampling", "beams", "with the cache"],
)
def test_generate(options: dict[str, Any], compiled: Any) -> None:
    vlm = decoder(8 + 4 * len(options) + options.get("num_beams", 0) * 8)
    vlm.warmup({"input_ids": (3, 9)}, method="generate", **options)
    assert compiled() == 2
    vlm.generate(**prompts(5, 12, 2), **options)
    if "num_beams" not in options:
        list(vlm.generate(**prompts(5, 9, 2), **options, stream=True))
    assert compiled() == 0


def test_generate_by_example(compiled: Any) -> None:
    vlm = decoder(28)
    pictures = np.zeros((3, 9), np.float32)
    vlm.warmup(prompts(5, 9, 2) | {"pictures": pictures}, method="generate", max_new_tokens=30)
    assert compiled() == 2
    vlm.generate(**prompts(9, 9, 9), pictures=pictures + 1, max_new_tokens=31)
    assert compiled() == 0


def altclip() -> Any:
    model = AltCLIPModel(cases.WHOLE)
    return VLM(model, model.init(jax.random.key(0), **model.example_inputs())["params"])


def test_forward_and_methods(compiled: Any) -> None:
    vlm: Any = altclip()
    text = {name: array.shape for name, array in cases.texts().items()}
    vlm.warmup(text, method="get_text_features")
    assert compiled() == 1
    vlm.get_text_features(**cases.texts())
    assert compiled() == 0
    pixels = jax.ShapeDtypeStruct(cases.images().shape, np.float32)
    vlm.warmup(text | {"pixel_values": pixels}, return_loss=True)
    assert compiled() == 1
    vlm(**cases.texts(), pixel_values=cases.images().astype(np.float32), return_loss=True)
    assert compiled() == 0


def test_mistakes_are_those_of_the_call() -> None:
    with pytest.raises(ValueError, match="does not generate text"):
        altclip().warmup({"input_ids": (1, 4)}, method="generate")
    with pytest.raises(ValueError, match="max_new_tokens: expected"):
        decoder(16).warmup({"input_ids": (1, 4)}, method="generate", max_new_tokens=0)
