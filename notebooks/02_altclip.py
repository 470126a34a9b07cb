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
# # AltCLIP: pictures and sentences in one space, in six languages
#
# A small AltCLIP of this repository reads handwritten digits that it has never seen: it classifies them by sentences
# (zero-shot), and finds them for a query, in English, Russian, Greek, Chinese, Korean and Japanese.
#
# **Needs** half a minute on two cores, 1 GB of memory, `pip install flax-vlm[notebooks]`; nothing is downloaded. With
# a GPU or TPU, `from_pretrained("BAAI/AltCLIP")` instead of the folder below is all that changes.

# %%
from pathlib import Path

import jax
import numpy as np

import flax_vlm
from flax_vlm import demo, viz, zero_shot
from flax_vlm.inference import PictureVectors, TextVectors, embed

EXAMPLE = Path("../examples/altclip-digits")
viz.use_fonts(EXAMPLE / "fonts")  # matplotlib's own font has no Chinese, Japanese or Korean characters

vlm = flax_vlm.from_pretrained(EXAMPLE / "checkpoint")  # a PyTorch checkpoint, read as it is
with np.load(EXAMPLE / "heldout.npz") as held_out:
    pictures, labels = held_out["images"], held_out["labels"]
languages = demo.read_languages(EXAMPLE)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(vlm.params)):,} parameters")
print(f"{len(pictures)} pictures of {pictures.shape[1]} x {pictures.shape[2]} pixels")

# %% [markdown]
# ## Zero-shot: which sentence fits best?
#
# Every picture is compared with ten sentences, one a digit. No classifier was trained for it: other sentences, other
# classes. `zero_shot.classify` gives the softmax over the model's scaled cosines.

# %%
probabilities = {}
for language in languages:
    words = [language.word(digit) for digit in range(10)]
    probabilities[language.language] = zero_shot.classify(
        vlm, list(pictures), words, template=language.zero_shot, batch_size=len(pictures)
    )
accuracy = {name: float((of.argmax(-1) == labels).mean()) for name, of in probabilities.items()}
for language in languages:
    print(f"{language.language:10s} {accuracy[language.language]:6.1%}   {language.prompt(7)}")

assert min(accuracy.values()) > 0.9, accuracy

# %% [markdown]
# The pictures that it finds hardest, in English, and the probability of what it takes them for. A red frame is an
# error.

# %%
english = probabilities["English"]
hardest = np.argsort(english[np.arange(len(labels)), labels])[:16]
words = [languages[0].word(digit) for digit in range(10)]
taken = english[hardest].argmax(-1)
viz.gallery(
    pictures[hardest],
    [f"{words[digit]} {english[i, digit]:.0%}" for i, digit in zip(hardest, taken, strict=True)],
    right=taken == labels[hardest],
    title="The sixteen hardest pictures, and what the model takes them for",
)

# %% [markdown]
# ## One space for all languages
#
# Cosines of sentences about three and seven with one picture of each digit. Frames mark the sentence that each
# picture is most like. Whatever the language, the same two columns light up.

# %%
one_of_each = [int(np.flatnonzero(labels == digit)[0]) for digit in range(10)]
sentences = [language.prompt(digit) for digit in (3, 7) for language in languages]
text_embeds = embed(TextVectors(vlm), sentences, 32)
image_embeds = embed(PictureVectors(vlm), list(pictures), len(pictures))
cosines = text_embeds @ image_embeds[one_of_each].T
assert (cosines.argmax(1) == np.repeat([3, 7], len(languages))).all()

viz.similarity(
    cosines,
    sentences,
    images=pictures[one_of_each],
    highlight=False,
    title="Cosine of sentence and picture",
)

# %% [markdown]
# Sentences that mean the same lie together too, though they share no letter: Greek sentences and Chinese ones,
# written here as their words for the digits.

# %%
greek, chinese = (next(each for each in languages if each.code == code) for code in ("el", "zh"))
one, other = (embed(TextVectors(vlm), [each.prompt(digit) for digit in range(10)], 32) for each in (greek, chinese))
assert np.diag(one @ other.T).min() > 0.9 > 0.6 > (one @ other.T)[~np.eye(10, dtype=bool)].max()

viz.similarity(
    one @ other.T,
    [greek.word(digit) for digit in range(10)],
    [chinese.word(digit) for digit in range(10)],
    highlight=False,
    title="Cosine of a Greek and a Chinese sentence",
)

# %% [markdown]
# ## Text to image: a ranked gallery
#
# The pictures that are most like a sentence, the best first, with their cosines.

# %%
queries = [language.prompt(digit) for language, digit in zip(languages, (2, 7, 5, 3, 8, 4), strict=True)]
wanted = np.array([2, 7, 5, 3, 8, 4])
scores = embed(TextVectors(vlm), queries, 32) @ image_embeds.T  # [queries, pictures]
best = np.argsort(-scores, axis=1)[:, :8]
right = labels[best] == wanted[:, None]
assert right.mean() > 0.95

viz.gallery(
    pictures[best.ravel()],
    [f"{scores[query, i]:.2f}" for query, row in enumerate(best) for i in row],
    rows=queries,
    right=right.ravel(),
    size=0.85,
    title="Found for each sentence, among 360 pictures",
)
