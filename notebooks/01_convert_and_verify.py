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
# # From PyTorch to JAX and back, and how one knows that it is right
#
# A checkpoint is converted, looked into, verified and exported again. Then both models run on the same inputs, and
# their states are compared layer by layer, in float64, float32 and bfloat16: where numbers differ, by how much, and
# how one tells rounding from a mistake.
#
# **Needs** a minute on two cores, 1.5 GB of memory, `pip install flax-vlm[notebooks,verify]` (torch and transformers,
# which run the PyTorch side); nothing is downloaded.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

import flax_vlm
from flax_vlm import convert, viz

SOURCE = Path("../examples/altclip-digits/checkpoint")  # as transformers writes it: config.json, model.safetensors ...
WORK = Path(tempfile.mkdtemp())
viz.use_fonts("../examples/altclip-digits/fonts")

# %% [markdown]
# ## Convert
#
# Every tensor of the file is matched by one row of a table, and every parameter is filled once; what does not fit is
# an error, and then nothing is written. Memory does not grow with the checkpoint.

# %%
convert.to_flax(SOURCE, WORK / "altclip")
print(sorted(path.name for path in (WORK / "altclip").iterdir()))

# %% [markdown]
# ## Inspect
#
# What is in it, from its headers alone. The same works for PyTorch's files.

# %%
before, after = convert.inspect(SOURCE), convert.inspect(WORK / "altclip")
for found in (before, after):
    print(f"{found.kind}: {len(found.tensors)} tensors, {found.tree.size:,} numbers, {found.dtypes}")
for name, module in after.modules(depth=2).items():
    print(f"    {name:32s} {module.size:9,}")

# %% [markdown]
# Names stay as in PyTorch as far as they can; a `weight` that multiplies becomes a `kernel`, transposed.

# %%
for name in list(after.recorded)[:40:8]:
    print(f"{after.recorded[name]['torch']:58s} {before.tensors[after.recorded[name]['torch']].shape!s:14s} ->  {name}")

# %% [markdown]
# ## Verify
#
# All parameters bit for bit; and with `forward=True`, what the two models make of one input.

# %%
found = convert.verify(SOURCE, WORK / "altclip", forward=True)
print(found.report())
assert found.equal
assert found.outputs

# %% [markdown]
# ## And back
#
# The export has every tensor of the original, with the same bits.

# %%
convert.to_torch(WORK / "altclip", WORK / "back")
original, exported = (load_file(folder / "model.safetensors") for folder in (SOURCE, WORK / "back"))
assert original.keys() == exported.keys()
assert all(np.array_equal(original[name], exported[name]) for name in original)
print(f"{len(exported)} tensors, all equal")

# %% [markdown]
# ## Where numbers differ, and why
#
# Equal parameters do not make equal outputs: two right programs add the same numbers in another order, and round
# differently. What is the truth, then? Torch in float64 is close enough to it. Against that we measure three things:
#
# - **flax_vlm in float64**: the same formula, or not? Here a mistake cannot hide behind rounding.
# - **flax_vlm in float32 and bfloat16**, as it will be used.
# - **torch in float32 and bfloat16**, the noise floor: what rounding alone does to the original. Nobody can ask for
#   less.
#
# Compared are the states behind every layer of both towers, as RMS of the difference over RMS of the state.

# %%
rng = np.random.default_rng(0)
with np.load("../examples/altclip-digits/heldout.npz") as held_out:
    processor = flax_vlm.from_pretrained(WORK / "altclip").processor
    sentences = ["рукописная цифра семь", "手写数字三", "a photo of a handwritten eight"]
    inputs = processor(text=sentences, images=list(held_out["images"][:3]))
pixels = inputs["pixel_values"]
texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}

reference = transformers.AltCLIPModel.from_pretrained(SOURCE, dtype=torch.float64).eval()


def states_of_torch(tower: str, dtype: str) -> list[np.ndarray]:
    module = reference.to(getattr(torch, dtype)).get_submodule(tower)
    if tower == "vision_model":
        given = {"pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(getattr(torch, dtype))}
    else:
        given = {name: torch.from_numpy(array) for name, array in texts.items()}
    with torch.no_grad():
        states = module(**given, output_hidden_states=True).hidden_states
    return [state.double().numpy() for state in states]


def states_of_flax(tower: str, dtype: str, **changed: object) -> list[np.ndarray]:
    """`changed`: fields of the config to set wrong."""
    model_class = {"vision_model": flax_vlm.AltCLIPVisionModel, "text_model": flax_vlm.AltCLIPTextModel}[tower]
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        vlm = flax_vlm.from_pretrained(WORK / "altclip", model_class=model_class, dtype=dtype)
        model = vlm.model.clone(config=dataclasses.replace(vlm.config, **changed))
        given = {"pixel_values": pixels.astype(dtype)} if tower == "vision_model" else texts
        run = jax.jit(lambda params, given: model.apply({"params": params}, **given, output_hidden_states=True))
        return [np.asarray(state, np.float64) for state in run(vlm.params, given).hidden_states]


def apart(states: list[np.ndarray], truth: list[np.ndarray], mask: np.ndarray) -> list[float]:
    """RMS of the difference over RMS of the truth, behind each layer, where there are tokens."""
    return [
        float(np.sqrt(np.square(ours - right)[mask].mean() / np.square(right)[mask].mean()))
        for ours, right in zip(states, truth, strict=True)
    ]


# The float32 parameters are exact in float64, so torch's float64 is asked first, and narrowed only afterwards.
truths = {tower: states_of_torch(tower, "float64") for tower in ("vision_model", "text_model")}
masks = {"vision_model": np.ones(truths["vision_model"][0].shape[:2], bool), "text_model": texts["attention_mask"] != 0}
measured: dict[str, dict[str, list[float]]] = {}
for dtype in ("float64", "float32", "bfloat16"):
    for tower, truth in truths.items():
        lines = measured.setdefault(tower, {})
        lines[f"flax_vlm, {dtype}"] = apart(states_of_flax(tower, dtype), truth, masks[tower])
        if dtype != "float64":
            lines[f"torch, {dtype}"] = apart(states_of_torch(tower, dtype), truth, masks[tower])

for tower, lines in measured.items():
    print(tower, {name: f"{max(line):.1e}" for name, line in lines.items()})
    assert max(lines["flax_vlm, float64"]) < 1e-12
    for dtype in ("float32", "bfloat16"):  # as good as the original, or better
        assert max(lines[f"flax_vlm, {dtype}"]) < 1.5 * max(lines[f"torch, {dtype}"]), dtype

# %%
layers = ["input", *(f"layer {i}" for i in range(1, len(truths["vision_model"])))]
options = {"ticks": layers, "log": True, "ylabel": "distance to float64", "size": (7.2, 3.6)}
floor = ["torch, float32", "torch, bfloat16"]
viz.curves(measured["vision_model"], dotted=floor, title="Image tower: distance from torch in float64", **options)

# %% [markdown]
# Each layer adds its rounding to what came in, so the lines climb a little. float32 keeps 24 bits, about 6e-8 for
# each number that is rounded; bfloat16 keeps 8, about 4e-3. Ours and torch's lines lie on each other: the difference
# between the two is the size of either's own error, and says nothing of which one is right. (Ours often lies lower:
# norms and softmax are computed in float32.)

# %%
options["ticks"] = ["input", *(f"layer {i}" for i in range(1, len(truths["text_model"])))]
viz.curves(measured["text_model"], dotted=floor, title="Text tower: distance from torch in float64", **options)

# %% [markdown]
# ## What a mistake looks like
#
# Two small ones, of the kind that gives fluent, slightly wrong models: GELU instead of CLIP's "quick" GELU, and
# another epsilon in the norms. In bfloat16 the second could hide: it is smaller than the rounding. In float32 it
# stands far above the floor, and in float64 there is nothing to discuss.

# %%
truth = truths["vision_model"]
mistakes = {
    "GELU for quick GELU": states_of_flax("vision_model", "float32", hidden_act="gelu"),
    "norms with 1e-3, not 1e-5": states_of_flax("vision_model", "float32", layer_norm_eps=1e-3),
}
lines = {name: apart(states, truth, masks["vision_model"]) for name, states in mistakes.items()} | {
    name: measured["vision_model"][name] for name in ("torch, bfloat16", "flax_vlm, float32", "torch, float32")
}
assert min(max(line) for line in list(lines.values())[:2]) > 100 * max(lines["torch, float32"])

viz.curves(lines, dotted=floor, title="Mistakes, over the noise floor", **options | {"ticks": layers})
