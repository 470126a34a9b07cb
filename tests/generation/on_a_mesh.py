"""Run by test_generate.py in a process of its own, with four CPU devices: the same answers as on one."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_vlm import parallel
from flax_vlm.generation import GenerationConfig, generate
from tests.generation.tiny import PAD, TinyDecoder, prompts, random_params


def main() -> None:
    mesh = parallel.make_mesh(data=2, tensor=2)

    def spread(array: Any, *axes: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    model, inputs = TinyDecoder(), prompts(5, 9, 2, 4)
    params = random_params(model)
    spread_params = jax.tree.map(lambda leaf: spread(leaf, *[None, "tensor"][: leaf.ndim]), params)
    spread_inputs = {name: spread(array, "data") for name, array in inputs.items()}
    for options in ({}, {"num_beams": 2, "eos_token_id": 3}):
        config = GenerationConfig(max_new_tokens=12, pad_token_id=PAD, return_dict_in_generate=True, **options)
        expected = generate(model, params, inputs, config).sequences
        for given in (inputs, spread_inputs):
            out = generate(model, spread_params, given, config)
            np.testing.assert_array_equal(out.sequences, expected)
            if out.cache is not None and given is spread_inputs:
                keys = out.cache.layers[0].key
                assert keys.addressable_shards[0].data.size * 4 == keys.size, "each device keeps a quarter"
    print("the same answers")


if __name__ == "__main__":
    main()
