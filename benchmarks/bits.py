"""How few bits a weight can have: of the next tokens of right answers, how many stay the same?

The two generating models of examples/ are asked about held-out pictures in bfloat16, as they are and with their kernels
rounded: to eight bits as `from_pretrained(quantize="int8")` holds them, and to four as it does not. In four bits a
group of weights of one output has a scale and a least value of its own, each in 16 bits, and tables of tokens and the
head stay in eight.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks import machine
from flax_vlm import demo, from_pretrained
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.layers.quantized import Quantized, quantize, summed_axis

EXAMPLES = Path(__file__).parents[1] / "examples"
GROUPS = (128, 64, 32, 16)
OF_TOKENS = ("embedding", "lm_head", "output_layer")  # in the paths of what has a row or column for each token
ROWS = 64  # read at a time


class Asked(NamedTuple):
    """Inputs of a model, and at which of their positions the next token counts."""

    inputs: Mapping[str, np.ndarray]
    counted: Bool[np.ndarray, "B T"]


class Row(NamedTuple):
    weights: str
    model: str
    bits: float  # of a rounded weight, with its share of scales
    same: float
    tokens: int

    def __str__(self) -> str:
        return f"| {self.weights} | {self.model} | {self.bits:.2f} | {self.same:.2%} of {self.tokens:,} |"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, after a line about the machine."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bits", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every n-th question only")
    options = parser.parse_args(arguments)
    print(f"{machine.headline()}\n")
    print("| weights | model | bits | next tokens as in bfloat16 |\n|---|---|---:|---:|")
    for name, (folder, ask) in MODELS.items():
        for row in compare(name, EXAMPLES / folder, ask, options.every):
            print(row, flush=True)
    return 0


def compare(name: str, example: Path, ask: Callable[[Any, Path, int], Asked], every: int) -> Iterator[Row]:
    """Rows of one model. In float32, for comparison, nothing is rounded at all."""
    vlm, wide = (from_pretrained(example / "checkpoint", dtype=dtype) for dtype in ("bfloat16", "float32"))
    asked = ask(vlm, example, every)
    truth = next_tokens(vlm.model, vlm.params, asked)

    def row(weights: str, bits: float, model: Any, params: Any) -> Row:
        return Row(weights, name, bits, float((next_tokens(model, params, asked) == truth).mean()), truth.size)

    yield row("float32", 32, wide.model, wide.params)
    eight = from_pretrained(example / "checkpoint", dtype="bfloat16", quantize="int8")
    yield row("int8, a scale an output", 8, eight.model, eight.params)
    for group in GROUPS:
        params = rounded(wide.params, lambda kernel, group=group: in_four_bits(kernel, group))
        yield row(f"int4, groups of {group}", 4 + 32 / group, vlm.model, params)


def next_tokens(model: Any, params: Any, asked: Asked) -> Int[np.ndarray, " A"]:
    """The likeliest after each position that counts."""

    @jax.jit
    def likeliest(params: Any, inputs: Mapping[str, Any]) -> Int[Array, "B T"]:
        return model.apply({"params": params}, **inputs).logits.argmax(-1)

    width, said = asked.counted.shape[1], []
    for start in range(0, len(asked.counted), ROWS):
        some = {name: array[start : start + ROWS] for name, array in asked.inputs.items()}
        found = np.asarray(likeliest(params, some))[:, -width:]  # a picture may take more room than its tokens
        said.append(found[asked.counted[start : start + ROWS]])
    return np.concatenate(said)


def rounded(params: Any, round_kernel: Callable[[Array], Array]) -> Any:
    """Parameters in bfloat16 that stand for rounded ones."""
    made = flatten_params(params)
    for path, leaf in made.items():
        axis = summed_axis(path, leaf.shape)
        if axis is not None:
            of_tokens = any(word in path for word in OF_TOKENS)
            leaf = _floats(quantize(leaf, axis)) if of_tokens else round_kernel(leaf)
        made[path] = leaf.astype(jnp.bfloat16)
    return unflatten_params(made)


def in_four_bits(kernel: Float[Array, "D F"], group: int) -> Float[Array, "D F"]:
    """The nearest of 16 values, evenly spaced from the least to the greatest weight of a group, zero among them."""
    inputs, outputs = kernel.shape
    grouped = jnp.pad(kernel, ((0, -inputs % group), (0, 0))).reshape(-1, group, outputs)
    least = jnp.minimum(grouped.min(1, keepdims=True), 0)
    greatest = jnp.maximum(grouped.max(1, keepdims=True), 0)
    step = jnp.where(greatest > least, greatest - least, 1) / 15
    zero = jnp.round(-least / step)
    values = jnp.clip(jnp.round(grouped / step) + zero, 0, 15)
    return ((values - zero) * step).reshape(-1, outputs)[:inputs]


def _floats(kernel: Quantized) -> Float[Array, "D F"]:
    return kernel.values * kernel.scale


def idefics(vlm: Any, example: Path, every: int) -> Asked:
    """Questions about one to three digits, and right answers, in four languages."""
    with np.load(example / "heldout.npz") as held_out:
        images, labels = held_out["images"], held_out["labels"]
    questions = demo.make_questions(demo.read_speeches(example), labels)[::every]
    texts = [
        [*question.items([images[index] for index in question.pictures]), question.answer] for question in questions
    ]
    inputs = vlm.processor(texts)
    return Asked(inputs, inputs["attention_mask"] > 0)


def glm4v(vlm: Any, example: Path, every: int) -> Asked:
    """Questions about pictures of four digits, and right answers; what comes before a picture's end does not count."""
    with np.load(example / "heldout.npz") as held_out:
        images, labels = held_out["images"], held_out["labels"]
    scenes, questions = demo.make_scene_questions(demo.read_scene_speeches(example), labels)
    chats: Sequence[Any] = [
        [
            {"role": "user", "image": scenes[question.scene].draw(images), "content": question.text},
            {"role": "assistant", "content": question.answer},
        ]
        for question in questions[::every]
    ]
    inputs = vlm.processor(chats)
    _, end = vlm.config.picture_ids
    return Asked(inputs, np.cumsum(inputs["input_ids"] == end, 1) > 0)


MODELS: Mapping[str, tuple[str, Callable[[Any, Path, int], Asked]]] = {
    "IDEFICS": ("idefics-digits", idefics),
    "GLM-4V": ("glm4v-digits", glm4v),
}


if __name__ == "__main__":
    sys.exit(main())
