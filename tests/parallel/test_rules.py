"""Rules: from names to mesh axes, for parameters and, while they are in effect, for activations."""

import logging
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from flax_vlm import parallel
from flax_vlm.layers.linear import Dense, partitioned
from flax_vlm.layers.partitioning import HEADS, HIDDEN, INNER, constrain
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPVisionModel
from flax_vlm.pretrained import VLM
from tests.generation.test_vlm import PROMPTS, vlm
from tests.parity import altclip_cases as cases

ONE = parallel.make_mesh(devices=jax.devices()[:1])
EIGHT = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)


def test_presets() -> None:
    names = ("batch", "vocab", "embed", None)
    assert parallel.REPLICATED.spec(names) == P(("data", "fsdp"), None, None, None)
    assert parallel.FSDP.spec(("vocab", "embed")) == P(None, "fsdp")
    assert parallel.FSDP_TENSOR.spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert parallel.PRESETS.keys() == {"replicated", "fsdp", "fsdp_tensor"}
    with pytest.raises(ValueError, match="no rule for an axis named 'width': expected one of batch, heads"):
        parallel.FSDP.spec(("embed", "width"))
    with pytest.raises(ValueError, match="unknown rules 'zero': expected 'replicated', 'fsdp', 'fsdp_tensor', or"):
        parallel.shardings({}, ONE, "zero")


def test_a_mesh_axis_splits_an_array_once() -> None:
    rules = replace(parallel.FSDP_TENSOR, length="tensor")
    assert rules.spec(("batch", "length", "heads")) == P(("data", "fsdp"), None, "tensor")
    assert rules.spec(("batch", "length", None)) == P(("data", "fsdp"), "tensor", None)


def test_parameters_that_cannot_be_placed_are_listed() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            bare = self.param("bare", nn.initializers.ones, (3,))
            odd = self.param("odd", partitioned(nn.initializers.ones, ("embed", "depth")), (3, 2))
            one = self.param("one", partitioned(nn.initializers.ones, (None,)), (1,))
            return (
                Dense(2, name="nameless")(x) + Dense(2, kernel_axes=("embed", "mlp"))(x) + bare.sum() + odd.sum() + one
            )

    boxed = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 3)))["params"]
    with pytest.raises(ValueError) as error:
        parallel.shardings(boxed, ONE)
    assert str(error.value).splitlines()[0] == "4 parameters cannot be placed on a mesh:"
    for fault in (
        "bare: its axes (3,) have the names (): expected one each",
        "odd: no rule for an axis named 'depth'",
        "nameless/kernel: its axes (3, 2) have the names (None, None)",
        "nameless/bias: its axes (2,) have the names (None,)",
    ):
        assert f"\n  {fault}" in str(error.value)


def test_mesh_and_rules_belong_together() -> None:
    other = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=jax.devices()[:1])
    explicit = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3, devices=jax.devices()[:1])
    for mesh in (other, explicit):
        with pytest.raises(ValueError, match=r"expected one of parallel\.make_mesh"), parallel.use(mesh, "fsdp"):
            pass
    idle: Any = EIGHT
    with pytest.raises(ValueError, match=r"the mesh has {'tensor': 2}, which .* do not use"):
        parallel.shardings({}, idle, "fsdp")


def test_activations_follow_the_rules_in_effect() -> None:
    def specs(rules: parallel.Rules, shape: tuple[int, ...], names: Any) -> P:
        with jax.sharding.use_abstract_mesh(EIGHT), nn.logical_axis_rules(rules.table):
            jaxpr = jax.make_jaxpr(lambda x: constrain(x, names))(jnp.ones(shape))
        (equation,) = jaxpr.eqns
        return equation.params["sharding"].spec

    rows, free = ("data", "fsdp"), P.UNCONSTRAINED
    assert specs(parallel.FSDP_TENSOR, (4, 5, 6), HIDDEN) == P(rows, None, None)
    assert specs(parallel.FSDP_TENSOR, (4, 5, 6), INNER) == P(rows, None, "tensor")
    assert specs(parallel.FSDP_TENSOR, (4, 6), INNER) == P(rows, "tensor")
    assert specs(parallel.FSDP, (8, 5, 6, 4), HEADS) == P(rows, None, None, None)
    # What does not divide evenly is the compiler's.
    assert specs(parallel.FSDP_TENSOR, (2, 5, 3, 4), HEADS) == P(free, None, free, None)


def test_without_rules_a_program_is_what_it_was() -> None:
    model = AltCLIPVisionModel(cases.VISION)
    params = nn.meta.unbox(abstract_params(model))
    images = jax.ShapeDtypeStruct((2, 30, 30, 3), jnp.float32)

    def constraints() -> int:
        forward = jax.make_jaxpr(lambda params, images: model.apply({"params": params}, images))
        return str(forward(params, images)).count("sharding_constraint")

    assert constraints() == 0
    with jax.set_mesh(ONE):
        assert constraints() == 0
    with parallel.use(ONE, "fsdp"):
        assert constraints() == 6 * cases.VISION.num_hidden_layers  # queries, keys, values, an MLP, and two sides


def test_other_rules_make_another_program() -> None:
    traced = []

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        traced.append(nn.get_logical_axis_rules())
        return constrain(2 * x, HIDDEN)

    x = np.ones((2, 3, 4))
    for _ in range(2):
        double(x)
        for rules in ("fsdp", "fsdp_tensor"):
            with parallel.use(ONE, rules):
                assert double(x).sharding.mesh == ONE
    assert traced == [(), parallel.FSDP.table, parallel.FSDP_TENSOR.table]


def test_batches() -> None:
    batch = {"ids": np.arange(6).reshape(3, 2), "mask": np.ones((3, 2), bool)}
    placed = parallel.global_batch(ONE, "fsdp", batch)
    assert placed["ids"].sharding == parallel.batch_sharding(ONE, "fsdp")
    assert placed["ids"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(placed["ids"], batch["ids"])
    assert parallel.process_share(ONE, "replicated") == (0, 1)


def test_a_stream_has_rules_in_effect_for_its_pieces_only(caplog: pytest.LogCaptureFixture) -> None:
    whole: Any = vlm().generate(**PROMPTS)
    on_mesh = VLM(vlm().model, vlm().params, vlm().processor, vlm().generation_config, ONE, "fsdp")
    out: Any = on_mesh.generate(**PROMPTS)
    np.testing.assert_array_equal(out.sequences, whole.sequences)
    with caplog.at_level(logging.INFO, "flax_vlm"):
        stream: Any = on_mesh.generate(**PROMPTS, stream=True)
        for _ in stream:
            assert nn.get_logical_axis_rules() == () and jax.sharding.get_abstract_mesh().empty
    assert not caplog.records, "the programs of `generate`, which other rules would not have found"
    np.testing.assert_array_equal(stream.output.sequences, whole.sequences)
