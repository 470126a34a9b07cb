"""Run by test_objective.py in a process with eight CPU devices: a sharded objective is what one device computes."""

from dataclasses import replace
from typing import Any

import jax

from flax_vlm import parallel
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.idefics import IdeficsForVisionText2Text
from flax_vlm.training.objective import contrastive, next_token
from tests.parity import altclip_cases, idefics_cases
from tests.training import test_objective as cases

# Of the tiny parameters too: the vocabulary, 72 words of IDEFICS, stands in two parts.
RULES = replace(parallel.FSDP_TENSOR, replicate_below=0)
IDEFICS = replace(cases.IDEFICS, vocab_size=72, additional_vocab_size=3)


def main() -> None:
    assert len(jax.devices()) == 8
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    model, params = IdeficsForVisionText2Text(IDEFICS, **cases.DOUBLE), idefics_cases.random_params(IDEFICS, "float64")
    texts = idefics_cases.texts(config=IDEFICS) | idefics_cases.embedded_images(IDEFICS)
    texts |= {"labels": idefics_cases.labels(texts, IDEFICS)}
    compare(mesh, model, params, idefics_cases.to_jax(texts, "float64"), next_token(model, vocab_chunk=20))
    model, params = cases.altclip()
    pairs = altclip_cases.texts(rows=8) | {"pixel_values": altclip_cases.images(8)}
    for kind in ("softmax", "sigmoid"):
        objective = contrastive(model, kind, microbatches=2, chunk=4)
        compare(mesh, model, params, altclip_cases.to_jax(pairs, "float64"), objective)
    print("objectives agree")


def compare(mesh: Any, model: Any, params: Any, batch: Any, objective: Any) -> None:
    run = cases.with_gradients(objective)
    expected = run(params, batch)
    params = jax.device_put(params, parallel.shardings(abstract_params(model), mesh, RULES))
    batch = jax.device_put(batch, parallel.batch_sharding(mesh, RULES))
    with parallel.use(mesh, RULES):
        cases.assert_equal(run(params, batch), expected)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
