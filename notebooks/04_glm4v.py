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
# # GLM-4V: a question about a picture, and where the answer was read
#
# A small GLM-4V of this repository answers questions about a picture of four handwritten digits: which is in a corner,
# and which there are. In this model a picture is words among words. So first we look at its slots and positions, then
# we follow attention from an answer back to the patches, and at last we test what the maps claim, by taking away what
# they point at.
#
# **Needs** a minute on two cores, 1 GB of memory, `pip install flax-vlm[notebooks]`; nothing is downloaded. With a
# GPU or TPU, `from_pretrained("THUDM/glm-4v-9b")` reads the large model in the same way.

# %%
from pathlib import Path

import numpy as np

import flax_vlm
from flax_vlm import demo, viz
from flax_vlm.demo.scenes import EMPTY, draw_scene
from flax_vlm.models.glm4v import image_attention

EXAMPLE = Path("../examples/glm4v-digits")
viz.use_fonts(Path("../examples/altclip-digits/fonts"))

vlm = flax_vlm.from_pretrained(EXAMPLE / "checkpoint")
with np.load(EXAMPLE / "heldout.npz") as held_out:  # the model has seen none of these
    digits, labels = held_out["images"], held_out["labels"]
(english,) = demo.read_scene_speeches(EXAMPLE)


def scene(*four: int, number: int = 0) -> demo.Scene:
    """Four digits in the order of reading."""
    chosen = [EMPTY if digit == EMPTY else int(np.flatnonzero(labels == digit)[number]) for digit in four]
    return demo.Scene(tuple(chosen), four)


picture = scene(7, 3, 0, 5).draw(digits)
viz.gallery([picture, scene(2, EMPTY, 9, 4).draw(digits)], columns=2, size=1.6)

# %% [markdown]
# ## Ask
#
# With `stream=True` the text comes as it is written. What comes first is the end of a line, which the layout of these
# chats has in front of an answer.

# %%
pieces = []
for piece in vlm.generate(**vlm.processor([[picture, "Which digits do you see?"]]), stream=True):
    print(f"[{piece}]", end="")
    pieces.append(piece)
assert "".join(pieces).strip() == "seven, three, zero and five"

# %% [markdown]
# Several questions about several pictures are one batch, padded on the left. One of these cells is empty.


# %%
def answers(prompts: list) -> list[str]:
    inputs = vlm.processor(prompts)
    out = vlm.generate(**inputs, max_new_tokens=12)
    return [text.strip() for text in vlm.processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :])]


other = scene(2, EMPTY, 9, 4).draw(digits)
prompts = [
    [picture, "Which digit is at the top left?"],
    [picture, "What is at the top right?"],
    [picture, "Which digit is at the bottom right?"],
    [other, "What is at the top right?"],
]
said = answers(prompts)
for (_, question), answer in zip(prompts, said, strict=True):
    print(question, "→", answer)
assert said == ["seven", "three", "five", "nothing"]

# %% [markdown]
# A chat keeps what it has read: the second question reads its own few tokens, and the picture is encoded once.

# %%
chat = vlm.chat(length=96, num_images=1)
print(chat.say("Which digit is at the bottom left?", images=[picture]).strip())
print(chat.say("Which digit is at the bottom right?").strip())

# %% [markdown]
# ## A picture is words, and has one position
#
# The processor writes three ids for a picture: begin, a placeholder, end. The image tower makes vectors for all three.
# It cuts these 32 x 32 pixels into 8 x 8 patches, and a convolution of stride two makes one vector of every two by two
# of them: 16 vectors, which take the placeholder's slots, between those of begin and end. (glm-4v-9b: 1,120 pixels,
# 80 x 80 patches, 1,600 vectors.) `lay_out` shows what the decoder gets. All vectors of the placeholder have its one
# position: between them there is no earlier and no later, and where each belongs in the picture is for the tower to
# say. So a picture is three positions long, however large it is.

# %%
inputs = vlm.processor([[picture, "Which digit is at the top left?"]])
laid = vlm.model.lay_out(inputs, 1)
names = {"<|begin_of_image|>": "begin", "<|end_of_image|>": "end", "[gMASK]": "gMASK", "<sop>": "sop"}
names |= {"<|user|>": "user:", "<|assistant|>": "assistant:"}


def slot_name(index: int, vector: int) -> str:
    """What stands in a slot: a patch is a box."""
    token = vlm.processor.decode([index], skip_special_tokens=False)
    return "▢" if 0 < vector % 18 < 17 and vector >= 0 else names.get(token, token.strip() or "⏎")


slots = [slot_name(*each) for each in zip(laid["input_ids"][0], laid["image_slots"][0], strict=True)]
positions = laid["position_ids"][0]
print(f"{inputs['input_ids'].shape[1]} ids, {len(slots)} slots, positions 0 to {positions.max()}")
assert [name for name, position in zip(slots, positions, strict=True) if position == 5] == ["▢"] * 16

middle = len(slots) - 9  # the strip in two halves
for part in (slice(0, middle), slice(middle, None)):
    print(" slot     ", *(f"{i:>{max(len(slots[i]), 2)}}" for i in range(len(slots))[part]))
    print(" position ", *(f"{positions[i]:>{max(len(slots[i]), 2)}}" for i in range(len(slots))[part]))
    print("          ", *(f"{slots[i]:>2}" for i in range(len(slots))[part]), "\n")

# %% [markdown]
# As a strip: slots advance, the position stands still while the picture passes.

# %%
strip = np.stack([np.arange(len(slots)), positions]) / 100  # the figure writes percent
viz.attention_over_words(slots, strip, rows=["slot", "position"], numbers=True)

# %% [markdown]
# Does it matter? The decoder takes laid-out slots with any positions. With those above it must give the logits that
# the whole model gives. If we count every slot, as a model of text would, the words behind the picture are fifteen
# places further away from it than they ever were in the training. Over many pictures and all four corners:

# %%
rng = np.random.default_rng(0)
scenes = [draw_scene(rng, labels, empty=0.0) for _ in range(40)]
drawn = [each.draw(digits) for each in scenes]
asked = [f"Which digit is at the {place}?" for place in english.places]
inputs = vlm.processor([[image, question] for image in drawn for question in asked])
ids, mask, images = (inputs[name] for name in ("input_ids", "attention_mask", "images"))
newline = np.full((len(ids), 1), vlm.processor.tokenizer.ordinary_ids("\n")[0], ids.dtype)
ids = np.concatenate([ids, newline], axis=1)  # what comes next is the word
mask = np.concatenate([mask, np.ones_like(newline)], axis=1)
first = [vlm.processor.tokenizer.ordinary_ids(word)[0] for word in english.words]
truth = np.array([each.digits for each in scenes]).reshape(-1)

rows = [vlm.model.lay_out({"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}, 1) for i in range(len(ids))]
laid = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
encoded = vlm.encode_images(images=images)


def right_digit(position_ids: np.ndarray) -> float:
    """How often the likeliest digit is the right one."""
    logits = vlm(**{**laid, "position_ids": position_ids}, **encoded).logits[:, -1]
    return float((np.asarray(logits)[:, first].argmax(-1) == truth).mean())


whole = vlm(input_ids=ids, attention_mask=mask, images=images).logits[:, -1]
apart = np.abs(np.asarray(vlm(**laid, **encoded).logits[:, -1]) - np.asarray(whole)).max()
print(f"logits of slots and of the whole model differ by {apart:.0e}")
shared = right_digit(laid["position_ids"])
counted = right_digit(np.maximum(laid["attention_mask"].cumsum(-1) - 1, 0))
print(f"right digits, one position for all patches: {shared:.1%}; a position for each: {counted:.1%}")
assert apart < 1e-3 and shared > 0.9

# %% [markdown]
# For this small model it hardly does: it finds patches by what they hold. What the rule saves is room. A position for
# each vector of glm-4v-9b would put the question 1,599 places further on, for every picture.

# %% [markdown]
# ## Attention, from the answer back to the patches
#
# `image_attention` runs prompt and answer once, and follows attention back through all layers. `own` is where a token
# looks itself, on the mean of layers and heads; `through_text` composes the layers, and so adds what a token has read
# from others that had looked (attention rollout). The first word is chosen at the end of line before it, so there we
# look. Above is the decoder alone, to the vectors, which are the two by two patches that they were made of. Below it
# goes on through the tower, where patches have looked at each other.

# %%
inputs = vlm.processor([[picture, question] for question in asked])
out = vlm.generate(**inputs, max_new_tokens=4)
decoder = image_attention(vlm.model, vlm.params, inputs, out.sequences, through_tower=False)
tower = image_attention(vlm.model, vlm.params, inputs, out.sequences)
at = inputs["input_ids"].shape[1]  # of the end of line
words = [text.strip() for text in vlm.processor.batch_decode(out.sequences[:, at:])]
assert words == ["seven", "three", "zero", "five"]
viz.overlay(
    picture,
    [*decoder.own[:, at, 0], *decoder.through_text[:, at, 0], *tower.own[:, at, 0]],
    titles=[f"{place}?" for place in english.places] * 3,
    notes=[f"“{word}”, {of}" for of in ("own", "through text", "own, tower") for word in words],
    columns=4,
    plain=False,
    title="Where the answer was read",
)

# %% [markdown]
# The decoder looks at the cell in question. With the tower the maps gather in a few patches of background, the same
# ones for every question: many patches attend these, so the way back leads there from anywhere. That does not say
# that they hold a digit.

# %% [markdown]
# One answer may be read from many places, word by word.

# %%
inputs = vlm.processor([[picture, "Which digits do you see?"]])
out = vlm.generate(**inputs, max_new_tokens=12)
attention = image_attention(vlm.model, vlm.params, inputs, out.sequences, through_tower=False)
tokens = [vlm.processor.decode([int(i)]).strip() for i in out.sequences[0]]
spoken = [i for i in range(inputs["input_ids"].shape[1], len(tokens)) if tokens[i] in english.words]
viz.overlay(
    picture,
    [attention.own[0, i - 1, 0] for i in spoken],
    titles=[tokens[i] for i in spoken],
    title="Where each word of one answer was read",
)

# %% [markdown]
# ## Do the maps tell the truth?
#
# Attention shows where information could flow. To know what was used we take things away: one cell of the picture is
# made black, and we ask again. The first table has the share of each cell in the decoder's own map of an answer, on the
# mean of 40 pictures; the second how often the answer becomes another when that cell is empty. If the maps are right,
# both are heavy on the diagonal.

# %%
inputs = vlm.processor([[image, question] for image in drawn for question in asked])
before = answers([[image, question] for image in drawn for question in asked])
attention = image_attention(
    vlm.model, vlm.params, inputs | {"input_ids": ids, "attention_mask": mask}, through_tower=False
)


def by_cell(maps: np.ndarray) -> np.ndarray:
    """Shares of the four cells, [scenes, questions, cells]."""
    quarters = maps[:, -1, 0].reshape(len(drawn), 4, 2, 4, 2, 4).sum((3, 5))
    return quarters.reshape(len(drawn), 4, 4)


own, through_text = by_cell(attention.own), by_cell(attention.through_text)
for name, cells in (("own", own), ("through_text", through_text)):
    hottest = (cells.argmax(-1) == np.arange(4)).mean()
    print(f"{name}: {cells.mean(0).diagonal().mean():.0%} in the asked cell, the hottest in {hottest:.0%} of answers")


def without(each: demo.Scene, cell: int) -> np.ndarray:
    """The scene with one cell black."""
    left = [EMPTY if i == cell else picture for i, picture in enumerate(each.pictures)]
    return demo.Scene(tuple(left), each.digits).draw(digits)


changed = np.zeros((4, 4))
for cell in range(4):
    after = answers([[without(each, cell), question] for each in scenes for question in asked])
    differs = [new != old for new, old in zip(after, before, strict=True)]
    changed[:, cell] = np.reshape(differs, (len(scenes), 4)).mean(0)
off = changed[~np.eye(4, dtype=bool)]
print(f"the asked cell is emptied: {changed.diagonal().mean():.1%} of answers change; another: {off.mean():.1%}")
assert changed.diagonal().mean() > 0.95 and off.mean() < 0.1

# %%
corners = [f"{place}?" for place in english.places]
viz.similarity(100 * own.mean(0), corners, english.places, decimals=0, size=0.9, title="Share of each cell, percent")

# %%
viz.similarity(100 * changed, corners, english.places, decimals=0, size=0.9, title="Another answer without it, percent")
