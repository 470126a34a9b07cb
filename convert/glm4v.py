"""GLM-4V's tensors: the names of THUDM's own code on the left, ours on the right.

`query_key_value` holds all heads' queries, then keys, then values; the decoder's `dense_h_to_4h` the gate, then what it
gates. The adapter's `dense_h_to_4h` is one tensor.
"""

from .clip_vision import dense, norm
from .rules import Drop, Row, Rule, conv, linear, under

_VISION_LAYER = (
    *norm("{n:input|post_attention}_layernorm", "{n}_layernorm"),
    Rule("attention.query_key_value.weight", tuple(f"attention/{p}_proj/kernel" for p in "qkv"), linear),
    Rule("attention.query_key_value.bias", tuple(f"attention/{p}_proj/bias" for p in "qkv")),
    *dense("attention.dense", "attention/dense"),
    *dense("mlp.fc{n:1|2}", "mlp/fc{n}"),
)

VISION = (
    Rule("patch_embedding.cls_embedding", "patch_embedding/cls_embedding"),
    Rule("patch_embedding.position_embedding.weight", "patch_embedding/position_embedding"),
    Rule("patch_embedding.proj.weight", "patch_embedding/proj/kernel", conv),
    Rule("patch_embedding.proj.bias", "patch_embedding/proj/bias"),
    *under("transformer.layers.{i}.", "transformer/layers_{i}/", _VISION_LAYER),
    Rule("conv.weight", "conv/kernel", conv),
    Rule("conv.bias", "conv/bias"),
    Rule("linear_proj.{p:linear_proj|gate_proj|dense_h_to_4h|dense_4h_to_h}.weight", "linear_proj/{p}/kernel", linear),
    *norm("linear_proj.norm1", "linear_proj/norm1"),
    Rule("{e:boi|eoi}", "{e}"),
)

_DECODER_LAYER = (
    Rule("{n:input|post_attention}_layernorm.weight", "{n}_layernorm/scale"),
    Rule("self_attention.query_key_value.weight", tuple(f"self_attention/{p}_proj/kernel" for p in "qkv"), linear),
    Rule("self_attention.query_key_value.bias", tuple(f"self_attention/{p}_proj/bias" for p in "qkv")),
    Rule("self_attention.dense.weight", "self_attention/dense/kernel", linear),
    Rule("mlp.dense_h_to_4h.weight", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), linear),
    Rule("mlp.dense_4h_to_h.weight", "mlp/down_proj/kernel", linear),
)

_DECODER = (
    Rule("embedding.word_embeddings.weight", "embedding/word_embeddings/embedding"),
    *under("encoder.layers.{i}.", "encoder/layers_{i}/", _DECODER_LAYER),
    Rule("encoder.final_layernorm.weight", "encoder/final_layernorm/scale"),
    Drop("rotary_pos_emb.inv_freq", "a buffer, rounded and without rope_ratio; recomputed in float32"),
)

MODEL = (*_DECODER, *under("vision.", "vision/", VISION))

_HEAD = Rule("transformer.output_layer.weight", "output_layer/kernel", linear)

WHOLE = (*under("transformer.", "transformer/", MODEL), _HEAD)

TEXT = (
    *under("transformer.", "transformer/", _DECODER),
    _HEAD,
    Drop("transformer.vision.{*}", "not in the text model"),
)

_GLM_LAYER = (
    Rule("{n:input|post_attention}_layernorm.weight", "{n}_layernorm/scale"),
    *dense("self_attn.{p:q|k|v}_proj", "self_attention/{p}_proj"),
    Rule("self_attn.o_proj.weight", "self_attention/dense/kernel", linear),
    Rule("mlp.gate_up_proj.weight", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), linear),
    Rule("mlp.down_proj.weight", "mlp/down_proj/kernel", linear),
)

# The decoder as transformers' GlmForCausalLM spells it: read, and written under THUDM's names.
GLM = (
    Rule("model.embed_tokens.weight", "transformer/embedding/word_embeddings/embedding"),
    *under("model.layers.{i}.", "transformer/encoder/layers_{i}/", _GLM_LAYER),
    Rule("model.norm.weight", "transformer/encoder/final_layernorm/scale"),
    Rule("lm_head.weight", "output_layer/kernel", linear),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "GLM4VForConditionalGeneration": WHOLE,
    "GLM4VForCausalLM": TEXT,
    "GLM4VModel": MODEL,
    "EVA2CLIPModel": VISION,
}

OTHER_SPELLINGS: dict[str, tuple[tuple[Row, ...], ...]] = {  # that are only read
    "GLM4VForConditionalGeneration": (GLM,),
    "GLM4VForCausalLM": (GLM,),
}
