"""AltCLIP's tensors: transformers' names on the left, ours on the right.

Released files and transformers 4.x call the text layers `encoder.layer`, 5.x `encoder.layers`; the image layers are
`encoder.layers` except in what 5.23 itself saves. `gamma` and `beta` are names from TensorFlow days.
"""

from .rules import Drop, Row, Rule, conv, linear, under


def _norm(torch: str, flax: str) -> tuple[Row, ...]:
    return (
        Rule(f"{torch}.[weight|weight|gamma]", f"{flax}/scale"),
        Rule(f"{torch}.[bias|bias|beta]", f"{flax}/bias"),
    )


def _dense(torch: str, flax: str) -> tuple[Row, ...]:
    return (Rule(f"{torch}.weight", f"{flax}/kernel", linear), Rule(f"{torch}.bias", f"{flax}/bias"))


_ROBERTA_LAYER = (
    *_dense("{a:attention|crossattention}.self.{p:query|key|value}", "{a}/self/{p}"),
    Rule("attention.self.distance_embedding.weight", "attention/self/distance_embedding/embedding"),
    *_dense("{a:attention|crossattention}.output.dense", "{a}/output/dense"),
    *_norm("{a:attention|crossattention}.output.LayerNorm", "{a}/output/LayerNorm"),
    *_dense("{a:intermediate|output}.dense", "{a}/dense"),
    *_norm("output.LayerNorm", "output/LayerNorm"),
)

ROBERTA = (
    Rule("embeddings.{t:word|position|token_type}_embeddings.weight", "embeddings/{t}_embeddings/embedding"),
    *_norm("embeddings.LayerNorm", "embeddings/LayerNorm"),
    *under("encoder.[layer|layers].{i}.", "encoder/layers_{i}/", _ROBERTA_LAYER),
    *_dense("pooler.dense", "pooler/dense"),
    Drop("embeddings.{b:position_ids|token_type_ids}", "a buffer of releases up to 4.30; counted afresh"),
)

TEXT = (
    *under("roberta.", "roberta/", ROBERTA),
    *_norm("pre_LN", "pre_LN"),
    *_dense("transformation", "transformation"),
)

_VISION_LAYER = (
    *_dense("self_attn.{p:q_proj|k_proj|v_proj|out_proj}", "self_attn/{p}"),
    *_norm("layer_norm{n:1|2}", "layer_norm{n}"),
    *_dense("mlp.fc{n:1|2}", "mlp/fc{n}"),
)

VISION = (
    Rule("embeddings.class_embedding", "embeddings/class_embedding"),
    Rule("embeddings.patch_embedding.weight", "embeddings/patch_embedding/kernel", conv),
    Rule("embeddings.position_embedding.weight", "embeddings/position_embedding"),
    *_norm("pre_layrnorm", "pre_layrnorm"),
    *under("encoder.[layers|layers|layer].{i}.", "encoder/layers_{i}/", _VISION_LAYER),
    *_norm("post_layernorm", "post_layernorm"),
    Drop("embeddings.position_ids", "a buffer of releases up to 4.30; counted afresh"),
)

ALTCLIP = (
    *under("text_model.", "text_model/", TEXT),
    *under("vision_model.", "vision_model/", VISION),
    Rule("{m:text|visual}_projection.weight", "{m}_projection/kernel", linear),
    Rule("logit_scale", "logit_scale"),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "AltCLIPModel": ALTCLIP,
    "AltCLIPTextModel": TEXT,
    "AltCLIPVisionModel": VISION,
    "AltRobertaModel": ROBERTA,
}
