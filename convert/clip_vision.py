"""The tensors of the CLIP image tower: transformers' names on the left, ours on the right.

Its layers are `encoder.layers` except in AltCLIP files that transformers 5.23 saves itself. `gamma` and `beta` are
names from TensorFlow days.
"""

from .rules import Drop, Row, Rule, conv, linear, under


def norm(torch: str, flax: str) -> tuple[Row, ...]:
    """A LayerNorm."""
    return (
        Rule(f"{torch}.[weight|weight|gamma]", f"{flax}/scale"),
        Rule(f"{torch}.[bias|bias|beta]", f"{flax}/bias"),
    )


def dense(torch: str, flax: str) -> tuple[Row, ...]:
    """A Linear with a bias."""
    return (Rule(f"{torch}.weight", f"{flax}/kernel", linear), Rule(f"{torch}.bias", f"{flax}/bias"))


_VISION_LAYER = (
    *dense("self_attn.{p:q_proj|k_proj|v_proj|out_proj}", "self_attn/{p}"),
    *norm("layer_norm{n:1|2}", "layer_norm{n}"),
    *dense("mlp.fc{n:1|2}", "mlp/fc{n}"),
)

VISION = (
    Rule("embeddings.class_embedding", "embeddings/class_embedding"),
    Rule("embeddings.patch_embedding.weight", "embeddings/patch_embedding/kernel", conv),
    Rule("embeddings.position_embedding.weight", "embeddings/position_embedding"),
    *norm("pre_layrnorm", "pre_layrnorm"),
    *under("encoder.[layers|layers|layer].{i}.", "encoder/layers_{i}/", _VISION_LAYER),
    *norm("post_layernorm", "post_layernorm"),
    Drop("embeddings.position_ids", "a buffer of releases up to 4.30; counted afresh"),
)
