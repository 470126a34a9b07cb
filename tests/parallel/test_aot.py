"""Programs compiled for TPUs that are not here; `make test-slow` installs the compiler that the slow tests ask."""

import importlib.util
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from flax_vlm import parallel
from flax_vlm.cli import plan, programs
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.parallel import aot, hlo
from flax_vlm.parallel.roofline import CHIPS, find_chip, roofline

# A loop of eight turns: in each an all-gather that runs beside a product, so that it is written twice, and a sum of
# which each device takes a part; behind it a sum over pairs of devices, and an exchange with nobody.
TEXT = """HloModule jit_step

%condition (state: (s32[], bf16[64,32])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%index, %constant.1), direction=LT
}

%start (part: bf16[64,8]) -> bf16[64,32] {
  ROOT %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=3, GROUPS
}

%product (whole: bf16[64,32]) -> bf16[64,32] {
  %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=3, GROUPS
}

%all-reduce-scatter.1 (whole: f32[64,32]) -> f32[16,32] {
  %all-reduce.1 = f32[64,32]{1,0} all-reduce(%whole), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[16,32]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,32}
}

%body (state: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %fusion.1 = bf16[64,32]{1,0} fusion(%part), kind=kCustom, calls=%start
  %fusion.2 = bf16[64,32]{1,0} fusion(%part), kind=kOutput, calls=%product
  %fusion.3 = f32[16,32]{1,0} fusion(%sum), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%next, %fusion.2)
}

%never (x: f32[7]) -> f32[7] {
  ROOT %all-reduce.9 = f32[7]{0} all-reduce(%x), channel_id=9, replica_groups=[4,2]<=[8], to_apply=%add
}

ENTRY %main (x: bf16[64,8]) -> f32[] {
  %while.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}) while(%tuple.0), condition=%condition, body=%body
  %all-reduce.2 = (f32[10]{0}, pred[3,2]{1,0}) all-reduce(%a, %b), channel_id=5, replica_groups=[4,2]<=[8]
  %collective-permute.1 = f32[100]{0} collective-permute(%c), channel_id=6, source_target_pairs={{0,1},{1,2}}
  ROOT %all-reduce.3 = f32[] all-reduce(%d), channel_id=7, replica_groups={{0},{1}}, to_apply=%add
}
""".replace("GROUPS", "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={1}")


def test_collectives_are_counted_with_their_loops() -> None:
    found = hlo.collectives(TEXT)
    assert sorted(found) == [
        ("all-gather", 64 * 32 * 2, 4, 8),
        ("all-reduce", 46, 2, 1),
        ("collective-permute", 400, 2, 1),
        ("reduce-scatter", 64 * 32 * 4, 4, 8),
    ]
    assert hlo.by_kind(found) == {
        "all-gather": (8, 8 * 4096 * 3 / 4),
        "all-reduce": (1, 46.0),  # half of it twice
        "collective-permute": (1, 400.0),
        "reduce-scatter": (8, 8 * 8192 * 3 / 4),
    }
    with pytest.raises(ValueError, match="expected HLO"):
        hlo.collectives("module @jit_step {}")


def test_the_slowest_part_binds() -> None:
    chip = find_chip("TPU v5 lite")
    assert chip is CHIPS["TPU v5 lite"] and find_chip("TPU v5p") is CHIPS["TPU v5"]
    bound = roofline(chip, flops=197e12, moved=2 * 819e9, sent=90e9)
    assert bound == (1.0, 2.0, 0.5) and bound.seconds == 2.0 and bound.binds == "memory"
    with pytest.raises(ValueError, match="nothing is known of the speed of 'abacus': expected one of TPU v4"):
        find_chip("abacus")


def test_what_is_held_is_counted() -> None:
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(lambda state, rows: (state + rows.sum(), rows.mean()), donate_argnums=0)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for shape in ((30, 10), (70,))]
    program = aot.compile_for(mesh, "replicated", step, *shapes)
    assert program.memory[:3] == (1480, 1220, 1200) and program.memory.outputs == 20  # 16 of them for the two pointers
    assert program.memory.total == 1500 + program.memory.temporaries
    assert program.collectives == [] and program.seconds > 0


def test_a_program_that_does_not_fit_says_by_how_much() -> None:
    class Full:
        def trace(self, *_: Any) -> "Full":
            return self

        def lower(self, **_: Any) -> "Full":
            return self

        def compile(self, _: Any) -> None:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
                "18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G."
            )

    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(aot.DoesNotFit, match=r"needs 18.50 GiB a chip, and there are 15.75") as caught:
        aot.compile_for(mesh, "replicated", Full())
    assert (caught.value.used, caught.value.available) == (18.5 * 2**30, 15.75 * 2**30)


def test_the_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install flax-vlm\[tpu\]"):
        aot.devices("v5e:8x8")


# Chips, ways to split the batch alone, and what to do; with GiB a chip and seconds of one core that the compiler took.
TRAINING = {
    "idefics-9b": ("v5e:8x8", 1, {"batch": 64, "seq": 1024, "images": 4}),  # 1.6 + 2.7 GiB, 74 s
    "glm-4v-9b": ("v5e:8x8", 1, {"batch": 64, "seq": 512}),  # 2.5 + 7.1 GiB, 47 s
    "altclip": ("v5e:16x16", 16, {"batch": 32768, "seq": 77, "accumulate": 4}),  # 0.7 + 2.2 GiB, 32 s
    "idefics-80b": ("v5p:8x8x4", 4, {"batch": 256, "seq": 1024, "images": 4}),  # 14.0 + 11.8 GiB, 130 s
}


def build(name: str, mode: Any, load: programs.Load) -> tuple[Any, int]:
    """The module, and how many parameters it has."""
    found = plan.read_model(name)
    module: Any = programs.build(registry.read_config(found), found["architectures"], mode, load)
    return module, sum(leaf.size for leaf in jax.tree.leaves(abstract_params(module)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_full_fine_tuning_fits(name: str) -> None:
    topology, data, options = TRAINING[name]
    load = programs.Load(**options)
    module, size = build(name, "train", load)
    mesh = parallel.make_mesh(data, -1, devices=aot.devices(topology))
    draft = programs.train_step(module, mesh, "fsdp", load)
    program = aot.compile_for(mesh, "fsdp", draft.jitted, *draft.arguments, quick=True)
    print(name, draft.held, program.memory, hlo.by_kind(program.collectives), f"{program.seconds:.0f} s")
    assert program.memory.total < find_chip(mesh.devices.flat[0].device_kind).memory
    for kernel in ("splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq"):
        assert kernel in program.text
    if name.startswith("idefics"):  # which image a token looks at is said by segments
        assert re.search('gated_cross_attn_layers/cross_attn/[^"]*splash_mha_fwd_segmented', program.text)
    assert gathered_at_once(program) < 2 * size  # in bytes: half of the parameters in float32


@pytest.mark.slow
def test_a_generation_of_eighty_billion_fits() -> None:
    load = programs.Load(batch=8, seq=512, images=2, new_tokens=64)
    module, size = build("idefics-80b", "generate", load)
    mesh = parallel.make_mesh(1, 1, -1, devices=aot.devices("v5e:4x8"))
    reading, writing = programs.generation(module, mesh, "fsdp_tensor", load)
    for draft in (reading, writing):  # 4.7 + 1.0 GiB and 14 s, 5.0 + 5.2 GiB and 7 s
        program = aot.compile_for(mesh, "fsdp_tensor", draft.jitted, *draft.arguments, quick=True)
        print(draft.held, program.memory, hlo.by_kind(program.collectives), f"{program.seconds:.0f} s")
        assert program.memory.total < find_chip(mesh.devices.flat[0].device_kind).memory
        assert gathered_at_once(program) < size / 100
    # About two products a parameter and token; pictures are read once, with the prompts.
    assert 1.6 * size < writing.flops / writing.tokens < 2.2 * size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idefics-9b", "glm-4v-9b"])
def test_reading_and_writing_hold_no_scores(name: str) -> None:
    """On eight v5e. A score for each pair of tokens would be [rows, heads, tokens, slots]: it is nowhere."""
    load = programs.Load(batch=8, seq=1496, images=1, new_tokens=64)
    module, _ = build(name, "generate", load)
    mesh = parallel.make_mesh(1, 1, -1, devices=aot.devices("v5e:2x4"))
    reading, writing = programs.generation(module, mesh, "fsdp_tensor", load)
    slots = reading.arguments[1]
    for draft in (reading, writing):
        program = aot.compile_for(mesh, "fsdp_tensor", draft.jitted, *draft.arguments, quick=True)
        print(name, program.memory, hlo.by_kind(program.collectives), f"{program.seconds:.0f} s")
        assert program.memory.total < find_chip(mesh.devices.flat[0].device_kind).memory
        assert ("splash_mha_fwd" in program.text) == (draft is reading)
        pairs = {shape for shape in shapes(program) if {load.seq, slots} <= set(shape)}
        assert all(math.prod(shape) <= load.batch * load.seq * slots for shape in pairs), pairs  # masks at most


@pytest.mark.slow
def test_embedding_holds_no_scores() -> None:
    """AltCLIP on four v5e, 64 pictures and texts each."""
    load = programs.Load(batch=256, seq=77)
    module, _ = build("altclip", "generate", load)
    mesh = parallel.make_mesh(devices=aot.devices("v5e:2x2"))
    boxed = abstract_params(module)
    params = jax.tree.map(programs._placed, nn.meta.unbox(boxed), parallel.shardings(boxed, mesh, "replicated"))
    inputs = programs._on(parallel.batch_sharding(mesh, "replicated"), programs.inputs(module, load))

    def forward(params: Any, inputs: Any) -> jax.Array:
        return module.apply({"params": params}, **inputs).logits_per_image

    program = aot.compile_for(mesh, "replicated", jax.jit(forward), params, inputs)
    print(program.memory, hlo.by_kind(program.collectives), f"{program.seconds:.0f} s")
    assert "splash_mha_fwd" in program.text
    vision = module.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    assert not {shape for shape in shapes(program) if shape[-2:].count(tokens) == 2}
    assert program.memory.total < find_chip(mesh.devices.flat[0].device_kind).memory


def shapes(program: aot.Program) -> set[tuple[int, ...]]:
    """Of all arrays in the program's text."""
    found = re.findall(r"\b(?:f32|bf16|f16|pred|s8|u8|s32)\[([0-9,]+)\]", program.text)
    return {tuple(map(int, each.split(","))) for each in found}


def gathered_at_once(program: aot.Program) -> int:
    """Bytes of what is made whole outside of the loops over layers, all of it together; sums that are not whole too, as
    the compiler writes the gathering of narrow parts as a sum."""
    gathers = [each for each in program.collectives if each.kind in ("all-gather", "all-reduce")]
    return sum(each.nbytes for each in gathers if each.times == 1)
