"""How far ours is from torch, beside how far torch is from itself: the table of parity in the README.

AltCLIP and IDEFICS are the two trained models of examples/, on their held-out pictures, beside transformers; GLM-4V is
one of random weights, beside transformers' GlmForCausalLM and the image tower of the parity tests, as no current
release has the original. All compare the same weights and pictures, rounded to the dtype before.

Differences are relative to the RMS of what torch gives in float64. The noise floor is torch in that dtype against torch
in float64, and in float64 itself torch against torch that takes one row at a time, which adds up in another order.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine

EXAMPLES = Path(__file__).parents[1] / "examples"
DTYPES = ("float64", "float32", "bfloat16")
QUESTIONS = 24
SEEDS = 3  # sets of random weights, whose differences are taken together

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """One model on both sides.

    Attributes:
      ours: from inputs to outputs; parameters and computation are in the dtype that is measured.
      torch: the same model, of the same weights.
      inputs: with pictures channels-last; what is floating is rounded to that dtype.
      outputs: arrays in double, of what either side gives to these inputs; rows come first.
    """

    ours: Callable[..., Any]
    torch: Any
    inputs: Arrays
    outputs: Callable[[Any, Arrays], Arrays]

    def run_ours(self) -> Arrays:
        return self.outputs(self.ours(**self.inputs), self.inputs)

    def run_torch(self, dtype: str, inputs: Arrays) -> Arrays:
        import torch

        kind = getattr(torch, dtype)
        tensors = {}
        for name, array in inputs.items():
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            tensor = torch.tensor(array.astype(np.float64) if floating else array)
            tensors[name] = tensor.movedim(-1, -3).to(kind) if floating else tensor  # only pictures are floating
        with torch.no_grad():
            return self.outputs(self.torch.to(kind)(**tensors), inputs)

    def run_torch_by_row(self, dtype: str) -> Arrays:
        rows = range(len(next(iter(self.inputs.values()))))
        each = [self.run_torch(dtype, {name: array[[row]] for name, array in self.inputs.items()}) for row in rows]
        return {name: np.concatenate([outputs[name] for outputs in each]) for name in each[0]}


class Difference(NamedTuple):
    """Relative to the RMS of what torch gives in float64."""

    rms: float
    largest: float

    def __str__(self) -> str:
        return f"{self.rms:.1e}, {self.largest:.1e}"


class Row(NamedTuple):
    family: str
    output: str
    dtype: str
    to_torch: Difference  # ours and torch in that dtype
    to_float64: Difference  # ours and torch in float64
    floor: Difference


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, after a line about the machine."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="again for each further one; all by default")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.families) - FAMILIES.keys()):
        parser.error(f"expected some of {', '.join(FAMILIES)}, came {', '.join(unknown)}")
    jax.config.update("jax_default_matmul_precision", "highest")
    chosen = [(family, dtype) for family in options.families or FAMILIES for dtype in options.dtype or DTYPES]
    rows = [row for family, dtype in chosen for row in compare(family, dtype)]
    print(f"{machine.headline()}\n")
    print(as_markdown(rows))
    return 0


def as_markdown(rows: list[Row]) -> str:
    """A pair in a cell is the RMS of the differences, and the largest."""
    header = ("family", "output", "dtype", "ours to torch", "ours to torch in float64", "noise floor")
    lines = [header, ("---", "---", "---", "---:", "---:", "---:"), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def compare(family: str, dtype: str) -> list[Row]:
    """A row for each output of a model."""
    errors: dict[str, list[list[np.ndarray]]] = {}
    for make in FAMILIES[family]:
        pair, ours = _run_ours(make, dtype)
        exact = pair.run_torch("float64", pair.inputs)
        theirs = pair.run_torch_by_row(dtype) if dtype == "float64" else pair.run_torch(dtype, pair.inputs)
        at_dtype = exact if dtype == "float64" else theirs
        for name, truth in exact.items():
            scale = np.sqrt(np.mean(np.square(truth)))
            compared = (ours[name], at_dtype[name]), (ours[name], truth), (theirs[name], truth)
            errors.setdefault(name, []).append([np.ravel(one - other) / scale for one, other in compared])
    return [
        Row(family, name, dtype, *(_difference(parts) for parts in zip(*each, strict=True)))
        for name, each in errors.items()
    ]


def _run_ours(make: Callable[[str], Pair], dtype: str) -> tuple[Pair, Arrays]:
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", dtype == "float64")  # in all threads, those that read weights among them
    try:
        pair = make(dtype)
        return pair, pair.run_ours()
    finally:
        jax.config.update("jax_enable_x64", before)


def _difference(errors: tuple[np.ndarray, ...]) -> Difference:
    together = np.concatenate(errors)
    if not np.isfinite(together).all():
        raise ValueError("an output is not finite: there is nothing to compare")
    return Difference(float(np.sqrt(np.mean(np.square(together)))), float(np.abs(together).max()))


def altclip(dtype: str) -> Pair:
    """60 pictures, and the names of ten digits in six languages."""
    import transformers

    from flax_vlm import from_pretrained
    from flax_vlm.demo.reading import read_languages

    example = EXAMPLES / "altclip-digits"
    vlm = from_pretrained(example / "checkpoint", dtype=dtype)
    texts = [language.prompt(digit) for language in read_languages(example) for digit in range(10)]
    with np.load(example / "heldout.npz") as held_out:
        inputs = vlm.processor(text=texts, images=list(held_out["images"][: len(texts)]))
    theirs = transformers.AltCLIPModel.from_pretrained(example / "checkpoint", dtype="float32").eval()
    names = ("image_embeds", "text_embeds")
    return Pair(
        vlm,
        _rounded(theirs, dtype),
        _rounded_arrays(inputs, dtype),
        lambda output, _: {name: _double(getattr(output, name)) for name in names},
    )


def idefics(dtype: str) -> Pair:
    """Questions about one to three pictures each, in four languages."""
    import transformers

    from flax_vlm import from_pretrained
    from flax_vlm.demo.talking import make_questions, read_speeches
    from tests.parity.idefics_cases import in_double

    example = EXAMPLES / "idefics-digits"
    vlm = from_pretrained(example / "checkpoint", dtype=dtype)
    with np.load(example / "heldout.npz") as held_out:
        images, questions = held_out["images"], make_questions(read_speeches(example), held_out["labels"])
    chosen = questions[:: len(questions) // QUESTIONS][:QUESTIONS]
    inputs = vlm.processor([question.items([images[index] for index in question.pictures]) for question in chosen])
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(example / "checkpoint", dtype="float32").eval()
    return Pair(vlm, in_double(_rounded(theirs, dtype)), _rounded_arrays(inputs, dtype), _logits)


def glm4v(dtype: str, seed: int) -> Pair:
    """Four prompts of 29 words with a picture among them, at another place each time."""
    from flax_vlm.models.glm4v import GLM4VForConditionalGeneration
    from flax_vlm.pretrained import VLM
    from tests.parity import glm4v_cases as cases

    theirs = cases.rounded_as_the_original(_rounded(cases.torch_whole("float32", seed), dtype))
    config, params = cases.ported(theirs)
    kind = jnp.dtype(dtype)
    model = GLM4VForConditionalGeneration(config, dtype=kind, param_dtype=kind)
    assert config.vision_config is not None and config.pad_token_id is not None
    rng, size, pad = np.random.default_rng(seed), config.vision_config.image_size, config.pad_token_id
    begin, end = config.picture_ids
    ids = rng.integers(0, pad, (4, 32))
    for row, place in enumerate((0, 9, 18, 29)):
        ids[row, place : place + 3] = begin, pad, end
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "images": rng.normal(size=(4, 1, size, size, 3))}
    return Pair(VLM(model, params), theirs, _rounded_arrays(inputs, dtype), _all_logits)


FAMILIES: Mapping[str, tuple[Callable[[str], Pair], ...]] = {
    "AltCLIP": (altclip,),
    "IDEFICS": (idefics,),
    "GLM-4V": tuple(lambda dtype, seed=seed: glm4v(dtype, seed) for seed in range(SEEDS)),
}


def _logits(output: Any, inputs: Arrays) -> Arrays:
    """Those of tokens: what a model says of padding means nothing."""
    return {"logits": _double(output.logits)[inputs["attention_mask"] != 0]}


def _all_logits(output: Any, inputs: Arrays) -> Arrays:
    """Where nothing is padded, and pictures take more room than their tokens."""
    return {"logits": _double(output.logits)}


def _rounded(model: Any, dtype: str) -> Any:
    import torch

    return model.to(getattr(torch, dtype))


def _rounded_arrays(inputs: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    return {
        name: array.astype(jnp.dtype(dtype)) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for name, array in inputs.items()
    }


def _double(array: Any) -> np.ndarray:
    """An array of either side."""
    return (array.double().numpy() if hasattr(array, "double") else np.asarray(array)).astype(np.float64)


if __name__ == "__main__":
    sys.exit(main())
