"""A decoder of two small layers, in linen and as the same torch model (transformers' GPT-2), for the tests here."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from flax_vlm.layers.attention import attend
from flax_vlm.layers.embed import Embed
from flax_vlm.layers.feed_forward import MLP
from flax_vlm.layers.kv_cache import KeyValue, KVCache
from flax_vlm.layers.linear import Dense
from flax_vlm.layers.norms import LayerNorm
from flax_vlm.models.outputs import states_to_keep

VOCAB, POSITIONS, WIDTH, HEADS, LAYERS = 40, 256, 16, 2, 2
PAD = 1


class TinyOutput(struct.PyTreeNode):
    logits: Float[Array, "B T V"]
    cache: KVCache | None


class TinyLayer(nn.Module):
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, memory: KeyValue, index: Any, mask: Array) -> tuple[Array, KeyValue]:
        width = self.width
        normed = LayerNorm(dtype=self.dtype, name="ln_1")(x)
        q, k, v = jnp.split(Dense(3 * width, dtype=self.dtype, name="qkv")(normed), 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], HEADS, width // HEADS) for a in (q, k, v))
        memory = memory.write(k, v, index)
        attended, _ = attend(q, memory.key, memory.value, mask=mask)
        x = x + Dense(width, dtype=self.dtype, name="out")(attended.reshape(x.shape))
        normed = LayerNorm(dtype=self.dtype, name="ln_2")(x)
        return x + MLP(4 * width, "gelu_new", dtype=self.dtype, name="mlp")(normed), memory


class TinyDecoder(nn.Module):
    """Learned positions, counted from what may be attended; `pictures` are added to the words, or taken from them."""

    vocab: int = VOCAB
    width: int = WIDTH
    dtype: Dtype = jnp.float32
    token_inputs = frozenset({"pictures"})

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: Dtype) -> KVCache:
        return KVCache.create(batch_size, length, [HEADS] * LAYERS, self.width // HEADS, dtype)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        cache: KVCache | None = None,
        pictures: Float[Array, "B T"] | None = None,
        negative: bool = False,
        logits_to_keep: Any = 0,
        deterministic: bool = True,
    ) -> TinyOutput:
        length = input_ids.shape[1]
        given = cache is not None
        cache = cache if given else self.init_cache(*input_ids.shape, self.dtype)
        before = cache.may_attend.sum(1, keepdims=True)
        positions = jnp.maximum(before + jnp.cumsum(attention_mask, axis=1) - 1, 0)
        cache = cache.admit(attention_mask != 0)
        x = Embed(self.vocab, self.width, dtype=self.dtype, name="wte")(input_ids)
        x = x + Embed(POSITIONS, self.width, dtype=self.dtype, name="wpe")(positions)
        if pictures is not None:
            x = x.at[..., 0].add((-3 if negative else 3) * pictures.astype(self.dtype))
        memories = []
        for i, memory in enumerate(cache.layers):
            x, memory = TinyLayer(self.width, self.dtype, name=f"h_{i}")(x, memory, cache.index, cache.mask(length))
            memories.append(memory)
        x = states_to_keep(LayerNorm(dtype=self.dtype, name="ln_f")(x), logits_to_keep)
        logits = Dense(self.vocab, use_bias=False, dtype=self.dtype, name="lm_head")(x)
        return TinyOutput(logits, cache.advance(length, memories) if given else None)


@cache
def torch_model() -> Any:
    """GPT-2, with weights large enough that its next words differ clearly."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_head=HEADS,
        n_layer=LAYERS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "h." in name else 1.0))
    return model


def params_of(model: Any) -> Mapping[str, Any]:
    """The torch model's parameters as the linen one's."""
    state = {name.removeprefix("transformer."): jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}

    def norm(name: str) -> dict[str, Any]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def dense(name: str) -> dict[str, Any]:  # GPT-2's kernels lie [in, out]
        return {"kernel": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    params: dict[str, Any] = {name: {"embedding": state[f"{name}.weight"]} for name in ("wte", "wpe")}
    params["ln_f"] = norm("ln_f")
    params["lm_head"] = {"kernel": state["wte.weight"].T}
    for i in range(LAYERS):
        params[f"h_{i}"] = {
            "ln_1": norm(f"h.{i}.ln_1"),
            "ln_2": norm(f"h.{i}.ln_2"),
            "qkv": dense(f"h.{i}.attn.c_attn"),
            "out": dense(f"h.{i}.attn.c_proj"),
            "mlp": {"fc1": dense(f"h.{i}.mlp.c_fc"), "fc2": dense(f"h.{i}.mlp.c_proj")},
        }
    return params


def random_params(model: TinyDecoder) -> Mapping[str, Any]:
    """Parameters for tests that compare with nothing but the model itself."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))
    random = np.random.default_rng(0)

    def value(path: Any, leaf: Any) -> Any:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, model.dtype)
        # Layers and biases that leave something of the word and its place: not every word is followed by the same.
        scale = 1.0 if leaf.ndim == 2 and not path[0].key.startswith("h_") else 0.3
        return jnp.asarray(random.normal(size=leaf.shape) * scale, model.dtype)

    return jax.tree_util.tree_map_with_path(value, nn.meta.unbox(shapes["params"]))


def prompts(*lengths: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random prompts of these lengths, padded on the left."""
    random = np.random.default_rng(seed)
    width = max(lengths)
    ids = np.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = random.integers(3, VOCAB, length)
    return {"input_ids": ids, "attention_mask": (np.arange(width) >= width - np.array(lengths)[:, None]).astype(int)}
