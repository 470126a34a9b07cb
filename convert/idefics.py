"""IDEFICS' tensors: transformers' names on the left, ours on the right. 4.x and 5.x write the same names."""

from .clip_vision import VISION, norm
from .rules import Drop, Row, Rule, Tied, linear, under

_DECODER_LAYER = (
    Rule("self_attn.{p:q|k|v|o}_proj.weight", "self_attn/{p}_proj/kernel", linear),
    Rule("mlp.{p:gate|up|down}_proj.weight", "mlp/{p}_proj/kernel", linear),
    Rule("{n:input|post_attention}_layernorm.weight", "{n}_layernorm/scale"),
    Drop("self_attn.rotary_emb.inv_freq", "a buffer of releases up to 4.32; recomputed in float32"),
)

_CROSS_LAYER = (
    Rule("alpha_{a:cross_attn|dense}", "alpha_{a}"),
    Rule("cross_attn.{p:q|k|v|o}_proj.weight", "cross_attn/{p}_proj/kernel", linear),
    Rule("cross_attn.{p:q|k}_layer_norm.weight", "cross_attn/{p}_layer_norm/scale"),
    Rule("mlp.{p:gate|up|down}_proj.weight", "mlp/{p}_proj/kernel", linear),
    Rule("{n:input|post_attention}_layernorm.weight", "{n}_layernorm/scale"),
    Drop("cross_attn.rotary_emb.inv_freq", "a buffer of releases up to 4.32, never used"),
)

_PERCEIVER_ATTENTION = (
    *norm("{n:context|latents|q|k}_layer_norm", "{n}_layer_norm"),
    Rule("{p:q|k|v|output}_proj.weight", "{p}_proj/kernel", linear),
)

_PERCEIVER_MLP = (
    *norm("ln", "ln"),
    Rule("{p:fc|c_proj}.weight", "{p}/kernel", linear),
)

PERCEIVER = (
    Rule("latents", "latents"),
    *under("blocks.{i}.0.", "blocks_{i}/attn/", _PERCEIVER_ATTENTION),
    *under("blocks.{i}.1.", "blocks_{i}/mlp/", _PERCEIVER_MLP),
    *norm("layer_norm", "layer_norm"),
)

MODEL = (
    Rule("embed_tokens.weight", "embed_tokens/embedding"),
    Rule("embed_tokens.additional_embedding.weight", "embed_tokens/additional_embedding/embedding"),
    *under("vision_model.", "vision_model/", VISION),
    *under("perceiver_resampler.", "perceiver_resampler/", PERCEIVER),
    *under("layers.{i}.", "layers_{i}/", _DECODER_LAYER),
    *under("gated_cross_attn_layers.{i}.", "gated_cross_attn_layers_{i}/", _CROSS_LAYER),
    Rule("norm.weight", "norm/scale"),
)

WHOLE = (
    *under("model.", "model/", MODEL),
    Rule("lm_head.weight", "lm_head/kernel", linear),
    Rule("lm_head.additional_fc.weight", "lm_head/additional_fc/kernel", linear),
)

TIED = (
    *under("model.", "model/", MODEL),
    Tied("lm_head.weight", "model/embed_tokens/embedding"),
    Tied("lm_head.additional_fc.weight", "model/embed_tokens/additional_embedding/embedding"),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "IdeficsForVisionText2Text": WHOLE,
    "IdeficsModel": MODEL,
    "IdeficsVisionModel": VISION,
    "IdeficsPerceiverResampler": PERCEIVER,
}

TIED_TABLES: dict[str, tuple[Row, ...]] = {"IdeficsForVisionText2Text": TIED}  # with tie_word_embeddings
