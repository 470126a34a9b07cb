"""Rules read in both directions, slice as they read, and report everything that does not fit at once."""

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_vlm.convert.errors import SHOWN, ConversionError
from flax_vlm.convert.rules import (
    ABSENT,
    DOUBLED,
    INTEGERS,
    MISSHAPEN,
    UNFILLED,
    UNKNOWN,
    Axes,
    Drop,
    Rule,
    Tied,
    conv,
    identity,
    linear,
    match,
    plan_read,
    plan_write,
    under,
)
from flax_vlm.convert.torch_files import InMemory

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64)
# A transform with the shapes of ours that it takes; sizes may be zero.
SIZES = st.integers(0, 4)
AXES = {
    identity: st.lists(SIZES, max_size=4).map(tuple),
    linear: st.tuples(SIZES, SIZES),
    conv: st.tuples(SIZES, SIZES, SIZES, SIZES),
    Axes("1 1 d -> d"): st.tuples(SIZES),
    Axes("1 -> "): st.just(()),
    Axes("a 1 b c -> c a b"): st.tuples(SIZES, SIZES, SIZES),
}


def bits(array: np.ndarray) -> tuple:
    return array.dtype, array.shape, np.ascontiguousarray(array).tobytes()


def random_array(data: st.DataObject, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """Any bits at all: NaNs and their payloads have to survive too."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), dtype).reshape(shape)


def random_index(data: st.DataObject, shape: tuple[int, ...]) -> tuple[slice, ...]:
    bound = st.none() | st.integers(-6, 6)
    return tuple(slice(data.draw(bound), data.draw(bound)) for _ in shape)


# ---------------------------------------------------------------------------------------------------------- templates


def test_a_template_stands_for_whole_names():
    rule = Rule("model.layers.{i}.{p:q|k|v}_proj.weight", "layers_{i}/{p}_proj/kernel", linear)
    assert match([rule], "model.layers.12.k_proj.weight") == (rule, {"i": "12", "p": "k"})
    for name in (
        "model.layers.12.k_proj.weight.scale",  # a name goes on
        "a.model.layers.12.k_proj.weight",
        "model.layers.12.o_proj.weight",  # not one of the words
        "model.layers.x.k_proj.weight",
        "model.layers..k_proj.weight",
        "model.layers.٣.k_proj.weight",  # a digit, but not one that we write
        "modelXlayers.12.k_proj.weight",  # a dot is a dot
    ):
        assert match([rule], name) is None


def test_spellings_are_read_all_and_written_by_key_style():
    rule = Rule("encoder.[layer|layers].{i}.norm.[weight|weight|gamma]", "layer_{i}/norm/scale")
    for name in ("encoder.layer.3.norm.weight", "encoder.layers.3.norm.weight", "encoder.layer.3.norm.gamma"):
        assert match([rule], name) == (rule, {"i": "3"})
    params = {"layer_3/norm/scale": np.zeros(2)}
    assert [target.torch for target in plan_write([rule], params)] == ["encoder.layer.3.norm.weight"]
    assert [target.torch for target in plan_write([rule], params, "v5")] == ["encoder.layers.3.norm.weight"]
    with pytest.raises(ConversionError, match="v4, v5"):
        plan_write([rule], params, "v6")  # pyright: ignore[reportArgumentType]


def test_a_spelling_may_be_empty():
    rows = under("[vision_model.|]", "vision_model/", [Rule("norm.weight", "norm/scale")])
    assert match(rows, "vision_model.norm.weight") == match(rows, "norm.weight") == (rows[0], {})


def test_tables_nest():
    roberta = (Rule("layer.{i}.weight", ("layer_{i}/a", "layer_{i}/b")), Drop("position_ids", "a buffer"))
    rows = under("text_model.", "text_model/", under("roberta.", "roberta/", roberta))
    assert rows[0] == Rule(
        "text_model.roberta.layer.{i}.weight", ("text_model/roberta/layer_{i}/a", "text_model/roberta/layer_{i}/b")
    )
    assert rows[1] == Drop("text_model.roberta.position_ids", "a buffer")


@pytest.mark.parametrize(
    ("torch", "flax"),
    [
        ("layers.{i}.weight", "layers/kernel"),  # the way back would not know i
        ("layers.weight", "layers_{i}/kernel"),
        ("layers.{i}.{i}.weight", "layers_{i}/kernel"),
        ("layers.{i}.weight", "[layer|layers]_{i}/kernel"),
        ("layers.{p:q|k}.weight", "layers/{p:q|v}/kernel"),
        ("layers.{i.weight", "layers_{i}/kernel"),
        ("layers.[only].weight", "layers/kernel"),
        ("layers.{*}", "layers"),
        ("layers.a|b", "layers"),
    ],
)
def test_a_rule_that_does_not_go_back_is_refused(torch: str, flax: str):
    with pytest.raises(ValueError, match="expected"):
        Rule(torch, flax)


def test_two_rows_for_one_name_are_an_error_of_the_table():
    rows = (Rule("{p:a|b}.weight", "{p}/kernel"), Rule("a.[weight|weights]", "other"))
    with pytest.raises(ValueError, match=re.escape("'{p:a|b}.weight' and 'a.[weight|weights]'")):
        match(rows, "a.weight")
    with pytest.raises(ValueError, match="several do"):
        plan_write((Rule("a", "x"), Rule("b", "x")), {"x": np.zeros(1)})
    with pytest.raises(ValueError, match="several do"):
        plan_write((Rule("a", "x"), Rule("a", "y")), {"x": np.zeros(1), "y": np.zeros(1)})


# --------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: axes.pattern)
@given(data=st.data())
def test_axes_go_back_and_slice_alike(axes: Axes, data: st.DataObject):
    ours = random_array(data, data.draw(AXES[axes]))
    torch = axes.to_torch(ours)
    assert torch.shape == axes.torch_shape(ours.shape)
    assert axes.flax_shape(torch.shape) == ours.shape
    assert bits(axes.to_flax(torch)) == bits(ours)
    index = random_index(data, ours.shape)
    assert bits(axes.to_flax(torch[axes.torch_index(index)])) == bits(ours[index])


def test_axes_are_what_torch_means_by_them():
    assert linear.flax_shape((11, 7)) == (7, 11)
    assert conv.flax_shape((8, 3, 14, 16)) == (14, 16, 3, 8)
    weight = np.arange(24).reshape(2, 3, 4, 1)
    assert conv.to_flax(weight)[3, 0, 2, 1] == weight[1, 2, 3, 0]
    assert np.shares_memory(conv.to_flax(weight), weight)


def test_axes_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match=r"gives 2 axes, 1 were expected"):
        linear.torch_shape((3,))
    with pytest.raises(ValueError, match=r"expects 1 where .*\(2, 3\)"):
        Axes("1 d -> d").to_flax(np.zeros((2, 3)))
    for pattern in ("a b -> a", "a a -> a", "a -> 1 a", "a -> b", "a b -> a a"):
        with pytest.raises(ValueError, match="each axis once"):
            Axes(pattern)


# ------------------------------------------------------------------------------------------------- tables, both ways

WORDS = st.sampled_from(("weight", "norm1", "a+b", "x(y", "c$", "fc*", "^k", "q_proj", "7"))
HOLES = ("{i}", "{j}", "{p:q|k|qk|v.w}")


@st.composite
def tables(draw: st.DrawFn) -> tuple[tuple[Rule | Drop, ...], dict[str, np.ndarray]]:
    """Rows that exclude each other by their first words, and parameters for some of what they can name."""
    rows: list[Rule | Drop] = []
    params: dict[str, np.ndarray] = {}
    data = draw(st.data())
    for number in range(draw(st.integers(1, 4))):
        holes = draw(st.lists(st.sampled_from(HOLES), unique=True))
        spellings = draw(st.lists(st.sampled_from(("[layer|layers]", "[a.|]", "[weight|weight|gamma]"))))
        torch = draw(st.permutations([*draw(st.lists(WORDS, max_size=3)), *holes, *spellings]))
        flax = draw(
            st.permutations([*draw(st.lists(WORDS, max_size=3)), *(re.sub(":[^}]*", "", hole) for hole in holes)])
        )
        names = [f"part{k}" for k in range(draw(st.integers(1, 3)))]
        transform = draw(st.sampled_from([axes for axes in AXES if len(names) == 1 or axes is linear]))
        shape = draw(AXES[transform])
        parts = tuple("/".join((f"row{number}", *flax, name)) for name in names)
        rows.append(Rule(".".join((f"row{number}", *torch)), parts if len(parts) > 1 else parts[0], transform))
        for held in draw(
            st.lists(
                st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from(("q", "k", "qk", "v.w"))),
                min_size=1,
                max_size=3,
            )
        ):
            dtype = draw(st.sampled_from(DTYPES))
            for part in parts:
                path = part.replace("{i}", str(held[0])).replace("{j}", str(held[1])).replace("{p}", held[2])
                # Parts of a fused tensor differ in rows, which for linear is our last axis.
                sized = (*shape[:-1], draw(SIZES)) if len(parts) > 1 else shape
                params[path] = random_array(data, sized, dtype)
        rows.append(Drop(f"row{number}.buffer.{{*}}", "not a parameter"))
    return tuple(rows), params


def written(
    rows: tuple[Rule | Drop, ...], params: Mapping[str, np.ndarray], style: str = "v4"
) -> dict[str, np.ndarray]:
    targets = plan_write(rows, params, style)  # pyright: ignore[reportArgumentType]
    state = {target.torch: target.build(params.__getitem__) for target in targets}
    assert [array.shape for array in state.values()] == [target.shape for target in targets]
    assert sorted(path for target in targets for path in target.flax) == sorted(params)
    return state


@given(table=tables(), style=st.sampled_from(("v4", "v5")), data=st.data())
def test_there_and_back_is_exact(table, style: str, data: st.DataObject):
    rows, params = table
    state = written(rows, params, style)
    files = InMemory(state | {"row0.buffer.of_something": np.zeros(3)})
    sources = {source.flax: source for source in plan_read(rows, files.tensors, params)}
    assert sources.keys() == params.keys()
    back = {path: source.read(files) for path, source in sources.items()}
    for path, array in params.items():
        assert bits(back[path]) == bits(array)
        index = random_index(data, array.shape)
        assert bits(sources[path].read(files, index)) == bits(array[index])
    assert {name: bits(a) for name, a in written(rows, back, style).items()} == {n: bits(a) for n, a in state.items()}


def test_a_fused_tensor_is_cut_by_the_shapes_of_its_parts():
    rows = (Rule("qkv.weight", ("q/kernel", "k/kernel", "v/kernel"), linear),)
    params = {
        name: np.zeros(shape) for name, shape in {"q/kernel": (4, 6), "k/kernel": (4, 2), "v/kernel": (4, 2)}.items()
    }
    fused = np.arange(40.0).reshape(10, 4)
    reads = []

    class Spy(InMemory):
        def read(self, name, index=None):
            reads.append(index)
            return super().read(name, index)

    files = Spy({"qkv.weight": fused})
    plan = {source.flax: source for source in plan_read(rows, files.tensors, params)}
    np.testing.assert_array_equal(plan["k/kernel"].read(files), fused[6:8].T)
    np.testing.assert_array_equal(plan["v/kernel"].read(files, (slice(1, 3), slice(1, None))), fused[9:10, 1:3].T)
    assert reads == [(slice(6, 8), slice(None)), (slice(9, 10), slice(1, 3))]  # and not a row more


def test_sources_come_in_the_order_of_the_file():
    rows = (Rule("{p:a|b|c}", "{p}"),)
    files = InMemory({name: np.zeros(1) for name in "cab"})
    assert [source.flax for source in plan_read(rows, files.tensors, dict.fromkeys("abc", np.zeros(1)))] == list("cab")


# --------------------------------------------------------------------------------------------------------------- tied

TIED = (Rule("embed.weight", "embed/embedding"), Tied("head.weight", "embed/embedding"))
TABLE = np.arange(6.0).reshape(3, 2)


def read_tied(**state: np.ndarray) -> np.ndarray:
    files = InMemory({f"{name}.weight": array for name, array in state.items()})
    (source,) = plan_read(TIED, files.tensors, {"embed/embedding": TABLE})
    return source.read(files)


def test_a_tied_tensor_may_be_absent_or_equal_and_is_never_written():
    for state in (
        {"embed": TABLE},
        {"embed": TABLE, "head": TABLE.copy()},
        {"head": TABLE, "embed": TABLE},
        {"head": TABLE},
    ):
        np.testing.assert_array_equal(read_tied(**state), TABLE)
    assert [target.torch for target in plan_write(TIED, {"embed/embedding": TABLE})] == ["embed.weight"]


def test_a_tied_tensor_that_differs_is_refused():
    with pytest.raises(ConversionError, match=r"head\.weight was expected to equal embed\.weight"):
        read_tied(embed=TABLE, head=TABLE + 1)
    with pytest.raises(ConversionError, match=r"head\.weight has shape \(2, 2\); \(3, 2\) was expected"):
        read_tied(embed=TABLE, head=TABLE[:2])


# ------------------------------------------------------------------------------------------------------------- faults

ROWS = (
    Rule("[layer|layers].{i}.weight", "layer_{i}/kernel", linear),
    Rule("qkv", ("q", "k")),
    Drop("inv_freq", "a buffer"),
)
KERNEL, FUSED = np.zeros((2, 3)), np.zeros((5, 2))
PARAMS = {"layer_0/kernel": KERNEL, "layer_1/kernel": KERNEL, "q": FUSED[:4], "k": FUSED[4:]}
STATE = {"layer.0.weight": KERNEL.T, "layers.1.weight": KERNEL.T, "qkv": FUSED, "inv_freq": np.zeros(7)}


def faults_of(state: Mapping[str, np.ndarray]) -> dict:
    with pytest.raises(ConversionError) as raised:
        plan_read(ROWS, InMemory(state).tensors, PARAMS)
    for kind, faults in raised.value.faults.items():
        assert kind in str(raised.value)
        assert faults[0] in str(raised.value)
    return raised.value.faults


def test_nothing_is_wrong_with_the_state():
    assert len(plan_read(ROWS, InMemory(STATE).tensors, PARAMS)) == len(PARAMS)


@pytest.mark.parametrize(
    ("change", "kind", "fault"),
    [
        ({"head.weight": np.zeros((3, 2))}, UNKNOWN, "head.weight (3, 2)"),
        ({"layer.2.weight": np.zeros((3, 2))}, ABSENT, "layer.2.weight (3, 2), for layer_2/kernel"),
        ({"layer.0.weight": None}, UNFILLED, "layer_0/kernel (2, 3)"),
        ({"layers.0.weight": np.zeros((3, 2))}, DOUBLED, "layer_0/kernel: layer.0.weight, layers.0.weight"),
        ({"layer.0.weight": np.zeros((2, 3))}, MISSHAPEN, "layer.0.weight has shape (2, 3); (3, 2) was expected"),
        ({"qkv": np.zeros((6, 2))}, MISSHAPEN, "qkv has shape (6, 2); (5, 2) was expected"),
        ({"qkv": np.zeros((5, 3))}, MISSHAPEN, "qkv has shape (5, 3); (5, 2) was expected"),
        ({"qkv": np.zeros((5, 2), np.int8)}, INTEGERS, "qkv is int8"),
    ],
)
def test_each_kind_of_fault(change: dict, kind: str, fault: str):
    state = {name: array for name, array in (STATE | change).items() if array is not None}
    assert faults_of(state) == {kind: [fault]}


def test_all_faults_are_raised_together():
    state = {"head": np.zeros(1), "layer.0.weight": np.zeros((1, 1)), "layer.7.weight": KERNEL.T, "qkv": FUSED}
    assert faults_of(state).keys() == {UNKNOWN, MISSHAPEN, ABSENT, UNFILLED}


def test_many_faults_of_one_kind_stay_readable():
    state = STATE | {f"layer.{i}.weight": np.zeros((3, 2)) for i in range(2, 49)}
    with pytest.raises(ConversionError) as raised:
        plan_read(ROWS, InMemory(state).tensors, PARAMS)
    assert len(raised.value.faults[ABSENT]) == 47
    assert str(raised.value).endswith("\n  and 37 more")
    assert str(raised.value).count("layer_") == SHOWN


def test_parameters_that_cannot_be_written_are_named():
    with pytest.raises(ConversionError) as raised:
        plan_write(ROWS, {"layer_0/kernel": np.zeros((2, 3)), "layer_0/bias": np.zeros(3), "q": np.zeros((4, 2))})
    assert list(raised.value.faults.values()) == [["layer_0/bias"], ["qkv: k"]]


def test_a_row_that_does_not_fit_its_parameter_is_named():
    with pytest.raises(ValueError, match=r"'layer'.*gives 2 axes"):
        plan_write((Rule("layer", "layer", linear),), {"layer": np.zeros(3)})
    with pytest.raises(ValueError, match="parts of one width"):
        plan_write((Rule("ab", ("a", "b")),), {"a": np.zeros((1, 2)), "b": np.zeros((1, 3))})
