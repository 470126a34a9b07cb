"""Run by test_families.py in a process with eight CPU devices: by any rules, sharded is what one device computes."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import flax_vlm
from flax_vlm import convert, parallel
from tests.convert import test_idefics_files, test_port
from tests.parity import altclip_cases, glm4v_cases, idefics_cases, test_glm4v_splice
from tests.tolerances import FLOAT64, assert_close, assert_gradients_close


class Case(NamedTuple):
    """What a family computes: inputs of eight rows, with which the model gives a loss and `scores`, and a prompt."""

    checkpoint: Path
    inputs: dict[str, np.ndarray]
    scores: str = "logits"
    flags: tuple[str, ...] = ()
    prompt: dict[str, np.ndarray] | None = None


def altclip(folder: Path) -> Case:
    test_port.write_hf(folder, np.float64)
    inputs = altclip_cases.texts(rows=8, length=12) | {"pixel_values": altclip_cases.images(8)}
    return Case(folder, inputs, "logits_per_text", ("return_loss",))


def idefics(folder: Path) -> Case:
    test_idefics_files.write_hf(folder, idefics_cases.RESAMPLED, np.float64)
    prompt = twice(idefics_cases.inputs(length=12, padding_side="left"))
    return Case(folder, prompt | {"labels": idefics_cases.labels(prompt)}, prompt=prompt)


def glm4v(_: Path) -> Case:
    """Rows with two pictures, one, none and two that touch."""
    prompt = twice(test_glm4v_splice.batch() | {"images": test_glm4v_splice.IMAGES})
    return Case(glm4v_cases.GOLDEN, prompt | {"labels": prompt["input_ids"]}, prompt=prompt)


def twice(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([array, array]) for name, array in inputs.items()}


FAMILIES: dict[str, Callable[[Path], Case]] = {"altclip": altclip, "idefics": idefics, "glm4v": glm4v}
# How the eight devices are divided, and whether the layers are scanned.
WAYS = {
    "replicated": ({"data": 8}, False),
    "fsdp": ({"data": 2, "fsdp": 4}, True),
    "fsdp_tensor": ({"data": 1, "fsdp": 2, "tensor": 4}, False),  # GLM-4V has fewer heads of keys than that
    "sequence": ({"data": 2, "fsdp": 2, "tensor": 2}, True),
}
RULES = {name: replace(rules, replicate_below=0) for name, rules in parallel.PRESETS.items()}  # nothing here is large
RULES["sequence"] = replace(RULES["fsdp_tensor"], length="tensor")


def loss_and_gradients(vlm: flax_vlm.VLM, case: Case, inputs: dict[str, Any]) -> tuple[Any, Any, dict[str, np.ndarray]]:
    def loss(params: dict[str, Any], inputs: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        output = vlm.model.apply({"params": params}, **inputs, **dict.fromkeys(case.flags, True))
        return output.loss, getattr(output, case.scores)

    (value, scores), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(vlm.params, inputs)
    return value, scores, convert.state_dict(vlm.config, jax.device_get(gradients))


def answers(vlm: flax_vlm.VLM, case: Case) -> Any:
    """Ids, or of a model that does not generate the features of images."""
    if case.prompt is None:
        return vlm.get_image_features(pixel_values=case.inputs["pixel_values"])
    return vlm.generate(**case.prompt, max_new_tokens=4, do_sample=False).sequences


def main(family: str, folder: Path, *ways: str) -> None:
    assert len(jax.devices()) == 8
    case = FAMILIES[family](folder)
    single = flax_vlm.from_pretrained(case.checkpoint, dtype="float64")
    arrays = {name: jax.numpy.asarray(array) for name, array in case.inputs.items()}
    expected_loss, expected_scores, expected = loss_and_gradients(single, case, arrays)
    expected_answers = answers(single, case)
    for name in ways:
        sizes, scan_layers = WAYS[name]
        mesh, rules = parallel.make_mesh(**sizes), RULES[name]
        vlm = flax_vlm.from_pretrained(
            case.checkpoint, dtype="float64", mesh=mesh, rules=rules, scan_layers=scan_layers
        )
        split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(vlm.params))
        assert bool(split) == (name != "replicated"), f"{name}: {split} parameters are split"
        with parallel.use(mesh, rules):
            inputs = parallel.global_batch(mesh, rules, case.inputs)
            loss, scores, gradients = loss_and_gradients(vlm, case, inputs)
        assert_close(loss, expected_loss, FLOAT64, f"loss, {name}")
        assert_close(scores, expected_scores, FLOAT64, f"{case.scores}, {name}")
        assert_gradients_close(gradients, expected)
        assert_close(answers(vlm, case), expected_answers, FLOAT64, f"answers, {name}")
        if name == "fsdp_tensor":
            options: dict[str, Any] = {"dtype": "float64", "quantize": "int8", "scan_layers": scan_layers}
            vlm = flax_vlm.from_pretrained(case.checkpoint, mesh=mesh, rules=rules, **options)
            whole = flax_vlm.from_pretrained(case.checkpoint, **options)
            assert_close(answers(vlm, case), answers(whole, case), FLOAT64, f"answers in eight bits, {name}")
        print(f"{name}: the same")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
