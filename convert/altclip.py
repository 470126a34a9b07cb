"""AltCLIP's tensors: transformers' names on the left, ours on the right.

Released files and transformers 4.x call the text layers `encoder.layer`, 5.x `encoder.layers`.
"""

from .clip_vision import VISION, dense, norm
from .rules import Drop, Row, Rule, linear, under

_ROBERTA_LAYER = (
    *dense("{a:attention|crossattention}.self.{p:query|key|value}", "{a}/self/{p}"),
    Rule("attention.self.distance_embedding.weight", "attention/self/distance_embedding/embedding"),
    *dense("{a:attention|crossattention}.output.dense", "{a}/output/dense"),
    *norm("{a:attention|crossattention}.output.LayerNorm", "{a}/output/LayerNorm"),
    *dense("{a:intermediate|output}.dense", "{a}/dense"),
    *norm("output.LayerNorm", "output/LayerNorm"),
)

ROBERTA = (
    Rule("embeddings.{t:word|position|token_type}_embeddings.weight", "embeddings/{t}_embeddings/embedding"),
    *norm("embeddings.LayerNorm", "embeddings/LayerNorm"),
    *under("encoder.[layer|layers].{i}.", "encoder/layers_{i}/", _ROBERTA_LAYER),
    *dense("pooler.dense", "pooler/dense"),
    Drop("embeddings.{b:position_ids|token_type_ids}", "a buffer of releases up to 4.30; counted afresh"),
)

TEXT = (
    *under("roberta.", "roberta/", ROBERTA),
    *norm("pre_LN", "pre_LN"),
    *dense("transformation", "transformation"),
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
