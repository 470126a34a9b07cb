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
# # IDEFICS: what it says, and where it looked
#
# A small IDEFICS of this repository is asked about handwritten digits in prompts that mix texts and pictures. Its
# answers come as a stream, and for every word of them there is a heat map over the pictures that it was read from:
# the attention of the words, composed through the resampler and the image tower down to the patches.
#
# **Needs** a minute on two cores, 1 GB of memory, `pip install flax-vlm[notebooks]`; nothing is downloaded. With a
# GPU or TPU, `from_pretrained("HuggingFaceM4/idefics-9b")` instead of the folder below is all that changes.

# %%
from pathlib import Path

import numpy as np
from PIL import Image

import flax_vlm
from flax_vlm import demo, viz
from flax_vlm.models.idefics import image_attention

EXAMPLE = Path("../examples/idefics-digits")
viz.use_fonts(Path("../examples/altclip-digits/fonts"))

vlm = flax_vlm.from_pretrained(EXAMPLE / "checkpoint")
with np.load(EXAMPLE / "heldout.npz") as held_out:
    pictures, labels = held_out["images"], held_out["labels"]


def picture(digit: int, number: int = 0) -> np.ndarray:
    """One that the model has never seen, at the size that it looks at."""
    image = Image.fromarray(pictures[np.flatnonzero(labels == digit)[number]])
    return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))


# %% [markdown]
# ## Texts and pictures, in the order of reading
#
# A prompt is a list. The processor makes arrays of a batch of them, padded on the left; `generate` goes on from
# there.

# %%
prompts = [
    [picture(7), "The digit is"],
    ["Erst", picture(4), ", dann", picture(9), ". Das sind"],
    ["Τι είναι αυτό;", picture(2), "Είναι το"],
    [picture(3), "还是", picture(6), "？大的是"],
]
inputs = vlm.processor(prompts)
print({name: array.shape for name, array in inputs.items()})

out = vlm.generate(**inputs, max_new_tokens=8)
answers = vlm.processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :])
for prompt, answer in zip(prompts, answers, strict=True):
    print(*("▢" if not isinstance(item, str) else item for item in prompt), "→", answer.strip())
assert [answer.strip() for answer in answers] == ["seven.", "vier und neun.", "δύο.", "六。"]

# %% [markdown]
# ## Streamed
#
# With `stream=True` the text comes as it is written, from the same compiled program.

# %%
three = [picture(3), picture(8, 1), picture(6)]
question = ["First", three[0], ", then", three[1], ", last", three[2], ". They are"]
pieces = []
for piece in vlm.generate(**vlm.processor([question]), max_new_tokens=8, stream=True):
    print(f"[{piece}]", end="")
    pieces.append(piece)
assert "".join(pieces).strip() == "three, eight and six."

# %% [markdown]
# ## Few-shot
#
# Examples with their answers may stand in front of a question. The large models learn a task from them. This small
# one was trained on questions without examples, and they only confuse it, which is worth seeing too: it often names
# the picture of the example.


# %%
def few_shot(shots: int, number: int = 48) -> list[list]:
    """Prompts for the first pictures, with so many examples in front, which are other pictures."""
    words, rng, prompts = demo.read_speeches(EXAMPLE)[0].words, np.random.default_rng(0), []
    for image in pictures[:number]:
        examples = [
            (pictures[i], f"The digit is {words[labels[i]]}.") for i in rng.integers(number, len(pictures), shots)
        ]
        prompts.append([item for example in examples for item in example] + [image, "The digit is"])
    return prompts


print("a prompt:", *("▢" if not isinstance(item, str) else item for item in few_shot(1)[0]))
words = demo.read_speeches(EXAMPLE)[0].words
right = {}
for shots in (0, 1):
    inputs = vlm.processor(few_shot(shots), pad_images_to_multiple_of=2)
    out = vlm.generate(**inputs, max_new_tokens=3)
    answers = vlm.processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :])
    right[shots] = np.mean([answer == f" {words[label]}." for answer, label in zip(answers, labels, strict=False)])
    print(f"{shots} examples: {right[shots]:.0%} right")
assert right[0] > 0.95 > right[1]

# %% [markdown]
# ## Which picture was each word read from?
#
# In IDEFICS a token looks at the last picture before it and at no other. So an answer behind three pictures looks at
# the third; what it says of the first two it has read from the words behind them, which looked there.
# `image_attention` runs prompt and answer once and follows both ways by attention rollout: `own` is where a token
# looks itself, `through_text` adds where the tokens looked that it has read from. A word is chosen by the token
# before it, so there we look.

# %%
inputs = vlm.processor([question])
out = vlm.generate(**inputs, max_new_tokens=8)
attention = image_attention(vlm.model, vlm.params, inputs, out.sequences)

begin = inputs["input_ids"].shape[1]
tokens = [vlm.processor.tokenizer.backend.id_to_token(int(i)).replace("▁", "") for i in out.sequences[0]]
said = [position for position in range(begin, len(tokens)) if tokens[position].isalpha()]
words = [tokens[position] for position in said]
print(" ".join(words))
assert words == ["three", "eight", "and", "six"]

own, through_text = (maps[0, np.array(said) - 1] for maps in attention)  # [words, pictures, 4, 4]
shares = through_text.sum((-2, -1))
assert np.allclose(own.sum((-2, -1))[:, 2], 1, atol=1e-5)  # itself, a word of the answer sees the last picture alone

viz.similarity(
    shares.T, ["first picture", "second picture", "third picture"], words, highlight=False, size=0.9,
    title="Share of each picture in each word, through the text",
)  # fmt: skip

# %% [markdown]
# The same with places: each column is a word, each row a picture.

# %%
heats = [through_text[word, number] for number in range(3) for word in range(len(words))]
viz.overlay(
    [three[number] for number in range(3) for _ in words],
    heats,
    titles=[word if number == 0 else "" for number in range(3) for word in words],
    notes=[f"{shares[word, number]:.0%}" for number in range(3) for word in range(len(words))],
    columns=len(words),
    title="Where each word of the answer was read from",
)

# %% [markdown]
# And which words it was read from: the decoder's own attention, on the mean of its layers and heads.

# %%
sight = np.zeros((1, len(tokens) - begin, 3), inputs["image_attention_mask"].dtype)
sight[..., -1] = 1
whole = {
    "input_ids": out.sequences,
    "pixel_values": inputs["pixel_values"],
    "image_attention_mask": np.concatenate([inputs["image_attention_mask"], sight], axis=1),
}
layers = vlm(**whole, output_attentions=True).attentions
weights = np.mean([np.asarray(layer[0]) for layer in layers], axis=(0, 1))[np.array(said) - 1]
weights = np.where(np.arange(len(tokens)) < np.array(said)[:, None], weights, np.nan)
shown = [{"<s>": "start", "<image>": "▢", "<fake_token_around_image>": "·"}.get(token, token) for token in tokens]
viz.attention_over_words(
    shown[: said[-1]],
    weights[:, : said[-1]],
    rows=words,
    title="What each word of the answer attended (▢ is a picture)",
)

# %% [markdown]
# ## In four languages
#
# One picture, one word each.

# %%
speeches = demo.read_speeches(EXAMPLE)
nine = picture(9, 3)
asked = vlm.processor([[nine, speech.naming[0][0].removeprefix("<image>")] for speech in speeches])
out = vlm.generate(**asked, max_new_tokens=4)
attention = image_attention(vlm.model, vlm.params, asked, out.sequences)
answers = vlm.processor.batch_decode(out.sequences[:, asked["input_ids"].shape[1] :])
names = [speech.heard(answer)[0] for speech, answer in zip(speeches, answers, strict=True)]
assert names == [speech.words[9] for speech in speeches]

last = asked["input_ids"].shape[1] - 1  # of the prompts, which are padded on the left
viz.overlay(
    nine,
    list(attention.through_text[:, last, 0]),
    titles=names,
    notes=[speech.language for speech in speeches],
    title="The same picture, read in four languages",
)

# %% [markdown]
# ## Do the maps tell the truth?
#
# Attention shows where information could flow, not what was used. So we hide patches, and see what it costs the right
# word: those that the map calls hottest, those it calls coldest, and others at random. If the map is worth something,
# the first curve falls and the second stays.

# %%
number, place = 48, speeches[0].naming[0][0].removeprefix("<image>")
seen = [
    np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))
    for image in pictures[:number]
]
asked = vlm.processor([[image, place] for image in seen])
truth = [vlm.processor.tokenizer.backend.token_to_id("▁" + speeches[0].words[label]) for label in labels[:number]]
heat = image_attention(vlm.model, vlm.params, asked).through_text[:, -1, 0].reshape(number, -1)


def right_word(order: np.ndarray, hidden: int) -> float:
    """How probable the right word is on the mean, where so many patches are black."""
    mask = np.zeros_like(heat, bool)
    np.put_along_axis(mask, order[:, :hidden], True, axis=1)
    mask = mask.reshape(number, 1, 4, 4).repeat(8, 2).repeat(8, 3)[..., None]
    pixels = np.where(mask, asked["pixel_values"].min(), asked["pixel_values"])
    logits = np.asarray(vlm(**{**asked, "pixel_values": pixels}).logits[:, -1], np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return float((odds[np.arange(number), truth] / odds.sum(-1)).mean())


orders = {
    "hottest first": np.argsort(-heat, axis=1),
    "at random": np.random.default_rng(0).permuted(np.tile(np.arange(16), (number, 1)), axis=1),
    "coldest first": np.argsort(heat, axis=1),
}
hidden = [0, 1, 2, 3, 4, 5, 6, 8]
curves = {name: [right_word(order, count) for count in hidden] for name, order in orders.items()}
assert curves["hottest first"][-1] < 0.5 * curves["at random"][-1]
assert curves["coldest first"][-1] > 0.95

viz.curves(
    curves, x=hidden, xlabel="patches hidden, of 16", ylabel="probability of the right word", title="Hiding what is hot"
)
