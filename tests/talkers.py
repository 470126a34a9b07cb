"""Tiny models that talk, each with a tokenizer whose words are read as they were said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn
from tokenizers import AddedToken, decoders, models, normalizers

from flax_vlm.generation import GenerationConfig
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.glm4v import GLM4VConfig, GLM4VForConditionalGeneration, GLM4VVisionConfig
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from flax_vlm.pretrained import VLM
from flax_vlm.processing import GLM4VProcessor, IdeficsProcessor, ImageProcessor, Tokenizer
from tests.parity import idefics_cases as cases

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
TOKENIZER = Path(__file__).parent / "golden" / "glm4v" / "tokenizer"
PAD, USER, ASSISTANT, OBSERVATION, NEWLINE, HELLO = 400, 407, 408, 409, 10, 352
GLM4V = GLM4VConfig(
    hidden_size=48,
    num_layers=1,
    num_attention_heads=4,
    kv_channels=12,
    ffn_hidden_size=40,
    padded_vocab_size=420,
    seq_length=256,
    eos_token_id=(PAD, USER, OBSERVATION),
    pad_token_id=PAD,
    boi_token_id=410,
    eoi_token_id=411,
    vision_config=GLM4VVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_heads=2,
        image_size=112,
        num_positions=65,
    ),
)


def tokenizer(added: list[str]) -> Tokenizer:
    """Words behind a space, each of them one piece, so that what a model says is read as it was written."""
    words = ["▁" + word for word in "cat dog mouse one two three red blue on under the".split()]
    words += [f"▁{a}{b}{a}" for a in "bdfklmn" for b in "aeiou"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(word, -1.0) for word in ["User:", "Assistant:", "\n", *words]] + [(c, -9.0) for c in "▁?gmnu"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ["<unk>", "<s>", "</s>", *added]])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    return Tokenizer(backend, named | {"additional_special_tokens": added, "padding_side": "left"})


def tiny_idefics(added: list[str]) -> VLM:
    """With the tokens `added` to its vocabulary."""
    text = tokenizer(added)
    config = replace(
        cases.RESAMPLED,
        vocab_size=len(text) - len(added),
        additional_vocab_size=len(added),
        num_hidden_layers=1,
        vision_config=replace(cases.VISION, num_hidden_layers=1),
        perceiver_config=replace(cases.PERCEIVER, resampler_depth=1),
    )
    # Large enough that the words differ, by what stands before them and by the pictures.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (3 if "embed_tokens" in str(path) else 2 if "layers" in str(path) else 1),
        cases.random_params(config, "float32"),
    )
    images = ImageProcessor.from_hf({"image_processor_type": "IdeficsImageProcessor", "image_size": 30})
    ids = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return VLM(IdeficsForVisionText2Text(config), params, IdeficsProcessor(images, text), ids)


def tiny_glm4v() -> VLM:
    """With random weights that say a line break, "hello", and words, which are read as they were written."""
    processor, model = GLM4VProcessor.from_dir(TOKENIZER), GLM4VForConditionalGeneration(GLM4V)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.1 * drawn if "scale" in str(path[-1]) else (1 if "embeddings" in str(path) else 0.2) * drawn

    params = jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract_params(model)))
    words = params["transformer"]["embedding"]["word_embeddings"]["embedding"]
    head = params["output_layer"]["kernel"]
    texts = [processor.tokenizer.decode(index) for index in range(400)]
    spoken = [index for index, text in enumerate(texts) if text[0] == " " and text[1:].isalpha() and text.isascii()]
    head[:, np.setdiff1d(np.arange(head.shape[1]), spoken)] = 0
    # Two channels of their own, which no layer reads or writes, say what follows these two.
    for channel, (before, after) in enumerate([(ASSISTANT, NEWLINE), (NEWLINE, HELLO)]):
        words[:, channel] = 0
        words[before, channel], head[channel, after] = 15, 4
    for name, layer in params["transformer"]["encoder"].items():
        if name.startswith("layers"):
            layer["input_layernorm"]["scale"][:2] = layer["post_attention_layernorm"]["scale"][:2] = 0
            layer["self_attention"]["dense"]["kernel"][:, :2] = layer["mlp"]["down_proj"]["kernel"][:, :2] = 0
    ids = GenerationConfig(eos_token_id=GLM4V.eos_token_id, pad_token_id=PAD)
    return VLM(model, jax.tree.map(jnp.asarray, params), processor, ids)
