# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Take the model apart
#
# A model of this library is linen modules and a dictionary of arrays, and nothing else. So any part of it works alone:
# a tower, one layer, an attention in a program of your own. Here an AltCLIP that reads handwritten digits is taken
# apart until it is known which of its parts read them: its states by name, what each part adds to the answer, what
# is lost without it, and from which layer on a straight line can tell the digits apart.
#
# **Needs** a minute on two cores, 1.5 GB of memory, `pip install flax-vlm[notebooks]`; nothing is downloaded.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import treescope
from flax import linen as nn

import flax_vlm
from flax_vlm import demo, viz
from flax_vlm.inference import TextVectors, embed
from flax_vlm.layers.attention import attend
from flax_vlm.layers.norms import RMSNorm
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.models.clip_vision.model import CLIPEncoderLayer

EXAMPLE = Path("../examples/altclip-digits")
viz.use_fonts(EXAMPLE / "fonts")

vlm = flax_vlm.from_pretrained(EXAMPLE / "checkpoint")
with np.load(EXAMPLE / "heldout.npz") as held_out:  # the model has seen none of these
    pictures, labels = held_out["images"], held_out["labels"]
pixels = vlm.processor(images=list(pictures))["pixel_values"]
print(f"{len(pictures)} pictures {pixels.shape[1:]}, {np.bincount(labels)} of the ten digits")

# %% [markdown]
# ## What it is made of
#
# `vlm.params` is a nested dictionary. Its names are those of PyTorch's checkpoint, as far as they can be. Each box is
# as high as it has numbers, and to the right of it stands what it is made of.

# %%
viz.parts(vlm.params, title="An AltCLIP of a million parameters")

# %% [markdown]
# [treescope](https://treescope.readthedocs.io) shows the same to click through, and pictures of the arrays too
# (`treescope.active_autovisualizer`). As text, one layer of the image tower:

# %%
layer_params = vlm.params["vision_model"]["encoder"]["layers_2"]
print(treescope.render_to_text(jax.eval_shape(lambda: layer_params)))

# %% [markdown]
# The module is a frozen dataclass, which says how to compute and holds no array. Click on a triangle to open it (where
# a page runs scripts; GitHub's does not).

# %%
treescope.display(vlm.model, streaming=False)

# %% [markdown]
# ## A tower alone, and a layer alone
#
# `model_class` takes a part out of the whole checkpoint, and reads no more than that. A layer needs no loading at all:
# its module, and its part of the dictionary.

# %%
tower = flax_vlm.from_pretrained(EXAMPLE / "checkpoint", model_class=flax_vlm.AltCLIPVisionModel)
out = tower(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
print("states", [state.shape for state in out.hidden_states])
print("attentions", [weights.shape for weights in out.attentions])

layer = CLIPEncoderLayer(tower.config)
alone, _ = layer.apply({"params": layer_params}, out.hidden_states[2])
print(f"the third layer alone: {np.abs(alone - out.hidden_states[3]).max():.0e} from what the tower gave")
assert np.allclose(alone, out.hidden_states[3], atol=1e-5)

# %% [markdown]
# ## Every state by its name
#
# Linen keeps what any module returns, under its own name, when it is asked to: `capture_intermediates`. Nothing has
# to be written into the model for it. The names are those of the parameters, so a state and the weights behind it are
# found in the same place.


# %%
@jax.jit
def apart(params, pixels):
    """What the tower gives, and what each of its modules did."""
    output, kept = tower.model.apply(
        {"params": params}, pixels, capture_intermediates=True, mutable=["intermediates"]
    )  # fmt: skip
    named = flatten_params(kept["intermediates"])
    return output, {name.removesuffix("/__call__"): value[0] for name, value in named.items()}


output, states = apart(tower.params, pixels)
for name in [name for name in states if name.startswith("encoder/layers_0")]:
    print(f"{name:42s}", *(leaf.shape for leaf in jax.tree.leaves(states[name])))

# %% [markdown]
# ## Who says which digit?
#
# The tower answers with one token, the first. To it every attention and every MLP adds something, and nothing else
# happens to it: what comes out at the end is a sum. Norm, projection and the comparison with a sentence are linear,
# once the length of the vectors is known, so the score of a sentence is a sum too: one term for each part of the
# model. (The bias of the norm is a term of its own, the same for every picture.)

# %%
language = demo.read_languages(EXAMPLE)[0]
texts = embed(TextVectors(vlm), [language.prompt(digit) for digit in range(10)], 16)  # [10, E], of length 1
scale = np.exp(vlm.params["logit_scale"])

terms = {"embedding": states["pre_layrnorm"][:, 0]}
for i in range(tower.config.num_hidden_layers):
    terms[f"attention {i + 1}"] = states[f"encoder/layers_{i}/self_attn"][0][:, 0]
    terms[f"MLP {i + 1}"] = states[f"encoder/layers_{i}/mlp"][:, 0]
first = sum(terms.values())
assert np.allclose(first, output.last_hidden_state[:, 0], atol=1e-5)

norm, projection = tower.params["post_layernorm"], vlm.params["visual_projection"]["kernel"]
deviation = np.sqrt(first.var(-1, keepdims=True) + tower.config.layer_norm_eps)
length = np.linalg.norm(output.pooler_output @ projection, axis=-1, keepdims=True)


def score(normed):
    """Of each sentence, of its share in the state behind the norm."""
    return np.asarray(scale * (normed @ projection / length) @ texts.T)


scores = {
    name: score((term - term.mean(-1, keepdims=True)) / deviation * norm["scale"]) for name, term in terms.items()
}
scores["bias"] = score(norm["bias"])
logits = vlm(**vlm.processor(text=[language.prompt(d) for d in range(10)]), pixel_values=pixels).logits_per_image
apart_by = np.abs(sum(scores.values()) - logits).max()
print(f"the sum of the terms is {apart_by:.0e} from the model's logits, which go up to {logits.max():.0f}")
assert apart_by < 1e-3

# %% [markdown]
# How much each term speaks for the right digit: its score of that sentence, over its mean score of the nine others. A
# column is the mean over the pictures of a digit.

# %%
own = np.eye(10, dtype=bool)[labels]


def margin(of):
    return of[own] - of[~own].reshape(-1, 9).mean(-1)


table = np.stack([[margin(of)[labels == digit].mean() for digit in range(10)] for of in scores.values()])
for name, row in zip(scores, table, strict=True):
    print(f"{name:12s} {row.mean():6.2f}")
one_of_each = [int(np.flatnonzero(labels == digit)[0]) for digit in range(10)]
viz.similarity(
    table,
    list(scores),
    images=pictures[one_of_each],
    decimals=1,
    highlight=False,
    signed=True,
    title="What each part says for the right digit, in logits",
)

# %% [markdown]
# ## Who is missed?
#
# To speak for the answer is one thing, to be needed is another: what an early layer finds, later ones pass on. So we
# silence parts, one at a time, and see how many pictures are still read. A head is silenced where its values enter
# the output projection, an MLP at its last kernel. It is the same compiled program each time, with other parameters.


# %%
@jax.jit
def accuracy(params):
    features = vlm.model.apply({"params": params}, pixels, method="get_image_features")
    return ((features @ texts.T).argmax(-1) == labels).mean()


def silenced(path, rows=slice(None)):
    """The parameters, with rows of a kernel at zero."""
    leaves = flatten_params(vlm.params)
    return unflatten_params(leaves | {path: leaves[path].at[rows].set(0)})


heads, layers = tower.config.num_attention_heads, tower.config.num_hidden_layers
width = tower.config.hidden_size // heads
missed = []
for i in range(layers):
    attention = f"vision_model/encoder/layers_{i}/self_attn/out_proj/kernel"
    one = [silenced(attention, slice(head * width, (head + 1) * width)) for head in range(heads)]
    every = [silenced(attention), silenced(f"vision_model/encoder/layers_{i}/mlp/fc2/kernel")]
    missed.append([100 * float(accuracy(params)) for params in one + every])
print(f"whole: {100 * accuracy(vlm.params):.1f}%")
missed = np.array(missed)
assert missed[0, -1] < missed[:, :heads].min()

viz.similarity(
    missed,
    [f"layer {i + 1}" for i in range(layers)],
    [*(f"head {head + 1}" for head in range(heads)), "all heads", "MLP"],
    decimals=1,
    highlight=False,
    limits=(100, missed.min()),
    size=0.8,
    title="Pictures read without one part, in percent",
)

# %% [markdown]
# The first MLP says nothing for the right digit, and is missed more than any head: what it writes is read by the layers
# behind it. The last one says six times as much as any other part, and can be done without: its verdict stands in its
# input already, only less loudly. The heads of the second layer are missed most when all are gone, and little one by
# one: they stand in for each other.

# %% [markdown]
# ## A linear probe
#
# From which layer on are the digits there, in a form that a straight line can read? A probe is a softmax regression on
# frozen states: of the first token, which gives the answer, and of the mean over the patches. It learns from five
# pictures of each digit and is tested on all the others. The tower has seen none of either. (It has been told of
# digits, though, by captions: this shows where they are, not that it found them by itself.)
#
# Accuracy alone says little: on digits, a probe of raw pixels does well too. So it stands beside, and so does the same
# tower with random weights. Sixteen draws of fifty pictures, five layers, two kinds of states and two towers make 320
# probes, and `vmap` trains them as one program.

# %%
DRAWS, SHOTS, STEPS = 16, 5, 200
rng = np.random.default_rng(0)
drawn = np.stack(
    [
        np.concatenate([rng.choice(np.flatnonzero(labels == digit), SHOTS, replace=False) for digit in range(10)])
        for _ in range(DRAWS)
    ]
)  # [draws, 50]
optimizer = optax.adamw(0.02, weight_decay=0.05)
truth = jnp.asarray(labels)


def probe(features, chosen):
    """The accuracy of a regression that learns from the chosen rows, on all the others."""
    mean, deviation = features[chosen].mean(0), features[chosen].std(0) + 1e-6  # of what it may see, no more
    features = (features - mean) / deviation

    def loss(params):
        logits = features[chosen] @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, truth[chosen]).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.zeros((features.shape[1], 10)), "bias": jnp.zeros(10)}
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
    right = (features @ params["kernel"] + params["bias"]).argmax(-1) == truth
    tested = jnp.ones(len(truth)).at[chosen].set(0)
    return (right * tested).sum() / tested.sum()


probes = jax.jit(jax.vmap(jax.vmap(probe, (None, 0)), (0, None)))  # [kinds, pictures, D], [draws, 50] -> [kinds, draws]


def states_of(params):
    """First tokens and means of patches, layer by layer: [2 * layers, pictures, D]."""
    found = tower.model.apply({"params": params}, pixels, output_hidden_states=True).hidden_states
    return jnp.stack([state[:, 0] for state in found] + [state[:, 1:].mean(1) for state in found])


untrained = nn.meta.unbox(tower.model.init(jax.random.key(0), pixels[:1])["params"])
found = np.asarray(probes(jnp.concatenate([states_of(tower.params), states_of(untrained)]), drawn))
names = ["first token", "mean of patches", "first token, random weights", "mean of patches, random weights"]
by_layer = dict(zip(names, found.reshape(4, layers + 1, DRAWS), strict=True))
raw = np.asarray(probes(jnp.asarray(pictures.reshape(1, len(pictures), -1), jnp.float32), drawn))[0]
print(f"{'raw pixels':32s} {raw.mean():.1%}")
for name, of in by_layer.items():
    print(f"{name:32s}", *(f"{value:6.1%}" for value in of.mean(-1)))

assert by_layer["first token"][-1].mean() > 0.95 > raw.mean() > by_layer["first token, random weights"][-1].mean()

# %%
lines = {name: 100 * of.mean(-1) for name, of in by_layer.items()} | {
    "raw pixels": np.full(layers + 1, 100 * raw.mean())
}
viz.curves(
    lines,
    spread={name: 100 * of.std(-1) for name, of in by_layer.items()},
    dotted=["raw pixels", *names[2:]],
    ticks=["embedding", *(f"layer {i + 1}" for i in range(layers))],
    ylabel="right, percent",
    title="Linear probes of fifty pictures (bands: one deviation of sixteen draws)",
    size=(7.6, 3.8),
)

# %% [markdown]
# Before the first layer the first token is the same for every picture, and a probe of it is at chance. Two layers on it
# tells nine of ten digits, behind the third nearly as many as the whole model, from five examples of each. Random
# layers do not help: what they give is worse than the pixels that went in.

# %% [markdown]
# ## Layers in a program of your own
#
# The layers know no model: they take plain numbers, and stand in any linen module. This one reads the frozen states
# behind the second layer with one learned query, through this library's `attend` and `RMSNorm`, and an optimizer of
# optax trains it in a few seconds, on half of the held-out pictures. The other half tests it.


# %%
class Reader(nn.Module):
    """One query for each head reads all patches; a Dense names the digit."""

    num_heads: int = 4

    @nn.compact
    def __call__(self, states):  # [B, P, D]
        batch = states.shape[0]
        normed = RMSNorm(name="norm")(states)
        query = self.param("query", nn.initializers.normal(1.0), (1, 1, self.num_heads, 16))
        key, value = (nn.DenseGeneral((self.num_heads, 16), name=name)(normed) for name in ("key", "value"))
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        read, weights = attend(query, key, value, return_weights=True)
        return nn.Dense(10, name="digit")(read.reshape(batch, -1)), weights[:, :, 0]


order = np.random.default_rng(1).permutation(len(labels))
learn, test = order[: len(order) // 2], order[len(order) // 2 :]
patches = out.hidden_states[2][:, 1:]
reader = Reader()
schedule = optax.adamw(3e-3, weight_decay=0.1)


@jax.jit
def trained(params):
    def loss(params):
        logits, _ = reader.apply({"params": params}, patches[learn])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[learn]).mean()

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = schedule.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, schedule.init(params)), length=150)
    return params, losses


params, losses = trained(nn.meta.unbox(reader.init(jax.random.key(0), patches[:1])["params"]))
named, weights = reader.apply({"params": params}, patches)
right = named.argmax(-1) == labels
print(
    f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters learn, loss {losses[0]:.2f} to {losses[-1]:.3f}"
)
print(f"right: {right[learn].mean():.1%} of the pictures that it learnt from, {right[test].mean():.1%} of the others")
assert right[test].mean() > 0.9

# %% [markdown]
# Where its heads look, on the mean of all four:

# %%
shown = [int(i) for digit in range(10) for i in test[labels[test] == digit][:1]]
viz.overlay(
    list(pictures[shown]),
    [weights[i].mean(0).reshape(4, 4) for i in shown],
    titles=[str(digit) for digit in range(10)],
    columns=10,
    size=0.9,
    title="Where the program looks",
)
