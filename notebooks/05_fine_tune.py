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
# # Fine-tune on eight devices
#
# A small IDEFICS of this repository names handwritten digits in English, German, Greek and Chinese. Here it learns
# Spanish: by low-rank adapters (LoRA), and with everything but the image tower. One run is taken away in the middle
# and goes on. What was learnt is measured on pictures that no run has seen, and so is what was forgotten. At the end
# the model runs in PyTorch.
#
# **Needs** two minutes on two cores, 3 GB of memory, `pip install flax-vlm[notebooks,verify]` (torch and transformers,
# for the last section); nothing is downloaded. On a TPU or several GPUs one line goes, and nothing else changes.

# %%
import dataclasses
import json
import signal
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from IPython.display import display
from PIL import Image
from sklearn.datasets import load_digits

import flax_vlm
from flax_vlm import convert, demo, fine_tuning, viz
from flax_vlm.inference import Answers, in_order
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.layers.stack import unstack_params
from flax_vlm.training import lora, peft, run
from flax_vlm.training.config import MeshConfig, TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.lora import LoraConfig
from flax_vlm.training.optimizer import OptimizerConfig
from flax_vlm.training.step import merge

jax.config.update("jax_num_cpu_devices", 8)  # the CPU acts as eight devices: delete this line on a TPU

EXAMPLE = Path("../examples/idefics-digits")
WORK = Path(tempfile.mkdtemp())
viz.use_fonts("../examples/altclip-digits/fonts")
jax.config.update("jax_compilation_cache_dir", str(WORK / "programs"))  # no run compiles what one before it has
print(f"{jax.device_count()} devices")

# %% [markdown]
# ## The data
#
# A line of JSON for each picture: a question, and the answer that is to be learnt. The answer begins with the space
# before it. The pictures are scikit-learn's digits, without the 360 of `heldout.npz`, which the example's model has
# never seen and these runs never see either.
#
# Nothing is to be done about the tokenizer: it has no word of Spanish, but spells any with the pieces it has.

# %%
SPANISH = demo.Speech(
    code="es",
    language="Spanish",
    words="cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
    naming=[["<image> La cifra es"]],
    larger=[],
    separators=(", ", " y "),
    answer=" {}.",
)
speeches = [SPANISH, *demo.read_speeches(EXAMPLE)]


def question(speech):
    """What comes behind the picture."""
    return speech.naming[0][0].removeprefix("<image>")


with np.load(EXAMPLE / "heldout.npz") as held_out:
    pictures, labels = held_out["images"], held_out["labels"]
unseen = {picture.tobytes() for picture in pictures}
digits, rng = load_digits(), np.random.default_rng(0)
spanish, known = [], []
for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
    image = np.rint(image * (255 / 16)).astype(np.uint8)
    if image.tobytes() in unseen:
        continue
    Image.fromarray(image).save(WORK / f"{number}.png")
    other = speeches[rng.integers(1, len(speeches))]
    for lines, speech in ((spanish, SPANISH), (known, other)):
        lines.append({"image": f"{number}.png", "question": question(speech), "answer": speech.say([digit])})
for name, lines in (("spanish", spanish), ("known", known)):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (WORK / f"{name}.jsonl").write_text(text, "utf-8")
    print(f"{name}.jsonl, {len(lines):,} lines:", *text.splitlines()[:2], sep="\n    ")

backend = flax_vlm.from_pretrained(EXAMPLE / "checkpoint").processor.tokenizer.backend
print({word: backend.encode(f" {word}.").tokens for word in SPANISH.words[7:]})

# %% [markdown]
# ## Three runs
#
# A run is a `TrainConfig`, the same dataclass that the recipes of `flax-vlm train` fill in. `mesh` spreads parameters,
# gradients and the optimizer's slots over the eight devices (FSDP), and each reads its own rows of the batch.
#
# What learns is said by patterns over the names of the parameters, of which the first that matches counts; or by
# `lora`, which freezes everything and puts two thin factors beside the kernels that it names.
#
# Whoever learns a language from nothing but its own examples may forget the others. So the second and third run also
# read the languages that the model knows, one line for each line of Spanish.

# %%
shared = TrainConfig(
    model=str(EXAMPLE / "checkpoint"),
    output=str(WORK / "alone"),
    data=DataConfig(paths=(str(WORK / "spanish.jsonl"),), format="questions", max_length=24),  # the longest has 23
    steps=60,
    batch_size=32,
    mesh=MeshConfig(data=1, fsdp=8),
    rules="fsdp",
    dtype="float32",
    remat="none",
    checkpoint_every=20,
    log_every=20,
)
both = dataclasses.replace(shared.data, paths=(str(WORK / "spanish.jsonl"), str(WORK / "known.jsonl")))
adapters = {
    "lora": LoraConfig(rank=8, targets="model/blocks/.*_proj/kernel"),
    "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=10, b2=0.98),
}
configs = {
    "LoRA, Spanish alone": dataclasses.replace(shared, **adapters),
    "LoRA": dataclasses.replace(shared, output=str(WORK / "lora"), data=both, **adapters),
    "all but the tower": dataclasses.replace(
        shared,
        output=str(WORK / "all"),
        data=both,
        trainable=(("model/vision_model/.*", False),),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10, b2=0.98),
    ),
}


def train(config, sample=None):
    prepared = run.prepare(config)
    return prepared, run.run(prepared, fine_tuning.load(prepared).params, sample)


runs = {"LoRA, Spanish alone": train(configs["LoRA, Spanish alone"])}

# %% [markdown]
# ## Taken away and given back
#
# Machines that cost less are taken away at any moment, and a job is told so by SIGTERM. Here we send it ourselves,
# after thirty steps, from the function that could show samples. The step that runs ends, and parameters, slots and the
# place in the data are saved.


# %%
def taken_away(model, params):
    signal.raise_signal(signal.SIGTERM)
    return ()


_, state = train(dataclasses.replace(configs["LoRA"], sample_every=30), taken_away)
saved = sorted(int(path.name) for path in (WORK / "lora/checkpoints").iterdir())
print(f"stopped after step {int(state.step)}; there are checkpoints of the steps {saved}")
assert int(state.step) == saved[-1] < shared.steps

# %% [markdown]
# The same call goes on from there, bit for bit as if nothing had happened (which this library's tests hold it to).

# %%
runs["LoRA"] = train(configs["LoRA"])
assert int(runs["LoRA"][1].step) == shared.steps

# %% [markdown]
# ## All but the image tower

# %%
runs["all but the tower"] = train(configs["all but the tower"])

# %% [markdown]
# ## What learns, and what it costs
#
# What is frozen has no gradient and no slots. Adam keeps two numbers for each one that learns, and each device keeps an
# eighth of those (but for small arrays, which are not worth gathering and stay whole).


# %%
def size(tree):
    """Bytes in all, and on the first device."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.nbytes for leaf in leaves), sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


for name in ("LoRA", "all but the tower"):
    _, state = runs[name]
    print(name)
    for what, tree in (("learns", state.params), ("slots", state.opt_state), ("frozen", state.frozen)):
        whole, here = size(tree)
        print(f"    {what:8s} {whole:10,} bytes, {here:9,} on each device")

# %%
for name in ("LoRA", "all but the tower"):
    _, state = runs[name]
    whole, learning = (unstack_params(tree) for tree in (merge(state.params, state.frozen), state.params))
    display(viz.parts(whole, learning=learning, depth=3, height=4.2, title=f"What learns: {name}"))

# %% [markdown]
# ## How they learn
#
# A run's folder has its losses in `log.jsonl`, a line a step. That of LoRA does not show where it was taken away. It
# ends higher than that of the third run, though its answers will be as right: it is less sure of them.

# %%
logs = {
    name: [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    for name, config in configs.items()
}
assert all([line["step"] for line in log] == list(range(1, shared.steps + 1)) for log in logs.values())
viz.losses(
    {name: [line["loss"] for line in log] for name, log in logs.items()},
    smooth=0.8,
    log=True,
    ylabel="loss of a token",
    title="Learning to name digits in Spanish",
)

# %% [markdown]
# ## Before and after
#
# `fine_tuning.finish` gives the trained model, adapters merged into their kernels. We save it and load it again, on one
# device this time: a checkpoint knows nothing of the mesh it came from.

# %%
models = {"before": flax_vlm.from_pretrained(EXAMPLE / "checkpoint")}
for name, (prepared, state) in runs.items():
    folder = Path(prepared.config.output) / "model"
    fine_tuning.finish(prepared, state).save_pretrained(folder)
    models[name] = flax_vlm.from_pretrained(folder)

NUMBER = 120  # held-out pictures
prompts = [[image, question(speech)] for speech in speeches for image in pictures[:NUMBER]]
expected = np.array([speech.say([digit]) for speech in speeches for digit in labels[:NUMBER]]).reshape(-1, NUMBER)
said = {}
for name, model in models.items():
    answers = in_order(Answers(model, max_new_tokens=10), prompts, batch_size=len(prompts))
    said[name] = np.array([answer.text for answer in answers]).reshape(-1, NUMBER)
right = {name: (of == expected).mean(1) for name, of in said.items()}
for name, of in right.items():
    print(f"{name:20s}", *(f"{speech.language} {value:.0%}  " for speech, value in zip(speeches, of, strict=True)))

assert right["before"][0] < 0.1 < 0.9 < right["before"][1:].min()
assert right["LoRA, Spanish alone"][0] > 0.9 > 0.5 > right["LoRA, Spanish alone"][1:].max()
assert min(right["LoRA"].min(), right["all but the tower"].min()) > 0.9

viz.similarity(
    100 * np.stack(list(right.values())),
    list(right),
    [speech.language for speech in speeches],
    decimals=0,
    highlight=False,
    limits=(0, 100),
    size=0.95,
    title="Right answers in percent, on pictures that none has seen",
)

# %% [markdown]
# Sixty steps of nothing but Spanish cost all other languages, although only one number in twenty was learnt: adapters
# do not protect from forgetting. The known languages among the data do, and cost Spanish next to nothing.

# %% [markdown]
# Before, the model takes the question for Greek, if it says anything.

# %%
one_of_each = [int(np.flatnonzero(labels[:NUMBER] == digit)[0]) for digit in range(10)]
viz.gallery(
    [pictures[i] for _ in models for i in one_of_each],
    [said[name][0, i].strip() for name in models for i in one_of_each],
    columns=10,
    rows=list(models),
    right=[bool(said[name][0, i] == expected[0, i]) for name in models for i in one_of_each],
    size=0.95,
    title="La cifra es ...",
)

# %% [markdown]
# ## To PyTorch
#
# The trained model in transformers: it says the same, token for token.

# %%
convert.to_torch(WORK / "lora/model", WORK / "torch")
theirs = transformers.IdeficsForVisionText2Text.from_pretrained(WORK / "torch").eval()
inputs = models["LoRA"].processor(prompts[:NUMBER])
ours = models["LoRA"].generate(**inputs, max_new_tokens=10, do_sample=False).sequences
given = {name: torch.from_numpy(array) for name, array in inputs.items()}
given["pixel_values"] = given["pixel_values"].movedim(-1, -3)  # channels first
with torch.no_grad():
    same = theirs.generate(**given, max_new_tokens=10, do_sample=False).numpy()
print(f"{ours.shape} ids, {(np.asarray(ours) != same).sum()} of them others than ours")
assert np.array_equal(ours, same)

# %% [markdown]
# And the adapters alone, as PEFT keeps them, for whoever has the base model already. Read back, they make the same
# model.

# %%
prepared, state = runs["LoRA"]
base = fine_tuning.load(prepared)
peft.save(WORK / "adapters", base.model, base.params, state.params, prepared.config.lora)
print({path.name: f"{path.stat().st_size:,} bytes" for path in sorted((WORK / "adapters").iterdir())})

before = models["before"]
config, adapters = peft.load(WORK / "adapters", before.model, before.params)
again = flatten_params(lora.merged(before.params, adapters, config))
apart = max(np.abs(again[path] - leaf).max() for path, leaf in flatten_params(models["LoRA"].params).items())
print(f"largest difference of a parameter: {apart:.0e}")
assert apart < 1e-6
