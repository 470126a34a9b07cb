"""IDEFICS run in other ways: from a cache, row by row, as a scan, recomputed, with dropout. All compute the same."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vlm.layers.stack import stack_params, unstack_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.idefics import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsPerceiverResampler,
    IdeficsVisionModel,
)
from tests.parity import idefics_cases as cases
from tests.tolerances import FLOAT32, FLOAT64, assert_close

CACHED = 1e-12  # in float64: the same operations, in other shapes
TIED, PLAIN = cases.TIED, cases.PLAIN


def model_of(config: IdeficsConfig, dtype: str = "float64", **options: Any) -> IdeficsForVisionText2Text:
    return IdeficsForVisionText2Text(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), **options)


def in_chunks(model: Any, params: Any, inputs: dict[str, Any], chunks: list[int], images_at: int | None) -> np.ndarray:
    """The logits of calls with `chunks` tokens each, from a cache; the images, if any, come with one of the calls.

    A chunk of negative length brings no image mask: it looks at what the last token before it looked at.
    """
    cache, start, logits = model.init_cache(4, 13), 0, []
    for i, chunk in enumerate(chunks):
        stop = start + abs(chunk)
        call = {name: inputs[name][:, start:stop] for name in ("input_ids", "attention_mask")}
        if images_at is not None and i >= images_at and chunk > 0:
            call["image_attention_mask"] = inputs["image_attention_mask"][:, start:stop]
        if i == images_at:
            call["perceiver_embeddings"] = inputs["perceiver_embeddings"]
        output = cases.forward(model, params, cases.to_jax(call, "float64") | {"cache": cache})
        cache, start = output.cache, stop
        logits.append(np.asarray(output.logits))
    assert start == 11 == int(cache.index)
    return np.concatenate(logits, axis=1)


CALLS = [([1] * 11, 0), ([5, 3, 3], 0), ([5, -3, 3], 0), ([5, 3, 3], 1), ([5, 3, 3], None)]


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("chunks, images_at", CALLS)
def test_a_cache_changes_nothing(chunks: list[int], images_at: int | None, scan: bool, x64: None) -> None:
    model, params = model_of(TIED, scan_layers=scan), cases.random_params(TIED, "float64")
    inputs = cases.texts(padding_side="left", config=TIED)
    if images_at is not None:
        inputs |= cases.embedded_images(TIED)
        inputs["image_attention_mask"][:, : 5 * images_at] = 0  # before there were images
    if -3 in chunks:
        inputs["image_attention_mask"][:, 5:8] = inputs["image_attention_mask"][:, 4:5]
    whole = cases.forward(model_of(TIED), params, cases.to_jax(inputs, "float64")).logits
    logits = in_chunks(model, cases.stacked(params) if scan else params, inputs, chunks, images_at)
    tokens = inputs["attention_mask"] != 0
    assert_close(logits[tokens], whole[tokens], CACHED)


def test_new_images_take_the_place_of_those_before(x64: None) -> None:
    """Three images for five tokens, then two others: as if all five were there, but seen from their own tokens only."""
    model, params = model_of(TIED), cases.random_params(TIED, "float64")
    text, images = cases.texts(padding_side="left", config=TIED), cases.embedded_images(TIED)
    first, mask = images["perceiver_embeddings"], images["image_attention_mask"]
    second, early = first[::-1, :2], np.arange(11)[:, None] < 5
    whole = text | {
        "perceiver_embeddings": np.concatenate([first, second], 1),
        "image_attention_mask": np.concatenate([mask * early, (mask * ~early)[..., :2]], -1),
    }
    cache, logits = model.init_cache(4, 13), []
    for tokens, pictures in ((slice(5), first), (slice(5, 11), second)):
        call = {name: array[:, tokens] for name, array in text.items()} | {"perceiver_embeddings": pictures}
        call["image_attention_mask"] = mask[:, tokens, : pictures.shape[1]]
        output = cases.forward(model, params, cases.to_jax(call, "float64") | {"cache": cache})
        cache = output.cache
        logits.append(output.logits)
    tokens = text["attention_mask"] != 0
    expected = cases.forward(model, params, cases.to_jax(whole, "float64")).logits
    assert_close(np.concatenate(logits, 1)[tokens], expected[tokens], CACHED)


def test_left_padding_changes_nothing() -> None:
    """As transformers promises its users: 1e-5, here on all tokens, of rows that have padding already or not."""
    params = cases.random_params(PLAIN, "float32")
    inputs = cases.texts(padding_side="left", config=PLAIN) | cases.embedded_images(PLAIN)
    by_token = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_attention_mask")}
    padded = inputs | {name: np.concatenate([0 * array, 0 * array, array], 1) for name, array in by_token.items()}
    arrays = [cases.to_jax(each, "float32") for each in (inputs, padded)]
    one, other = (cases.forward(model_of(PLAIN, "float32"), params, each) for each in arrays)
    tokens = inputs["attention_mask"] != 0
    assert_close(other.logits[:, 22:][tokens], one.logits[tokens], FLOAT32)


def test_embeddings_stand_for_their_ids(x64: None) -> None:
    params = cases.random_params(TIED, "float64")
    inputs = cases.to_jax(cases.texts(padding_side="left", config=TIED) | cases.embedded_images(TIED), "float64")
    table = params["model"]["embed_tokens"]
    tables = jnp.concatenate([table["embedding"], table["additional_embedding"]["embedding"]])
    embeds = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds["inputs_embeds"] = tables[inputs["input_ids"]]
    one, other = (cases.forward(model_of(TIED), params, each).logits for each in (inputs, embeds))
    np.testing.assert_array_equal(one, other)


def test_images_may_come_as_what_was_made_of_them(x64: None) -> None:
    """By the tower alone, by the resampler alone, or by the whole model in an earlier call."""
    config, model = cases.RESAMPLED, model_of(cases.RESAMPLED)
    params = cases.random_params(config, "float64")
    inputs = cases.to_jax(cases.inputs(), "float64")
    whole = cases.forward(model, params, inputs)
    pixels = inputs.pop("pixel_values")

    def part(model_class: Any, config: Any, name: str, inputs: Any) -> Any:
        return cases.forward(model_class(config, jnp.float64, jnp.float64), params["model"][name], inputs)

    pictures = {"pixel_values": pixels.reshape(-1, *pixels.shape[2:])}
    seen = part(IdeficsVisionModel, config.vision_config, "vision_model", pictures).last_hidden_state
    latents = part(IdeficsPerceiverResampler, config, "perceiver_resampler", {"context": seen})
    assert_close(latents.reshape(whole.image_hidden_states.shape), whole.image_hidden_states, FLOAT64)
    states = seen.reshape(*pixels.shape[:2], *seen.shape[1:])
    for name, embedded in (("image_encoder_embeddings", states), ("perceiver_embeddings", whole.image_hidden_states)):
        again = cases.forward(model, params, inputs | {name: embedded})
        assert_close(again.logits, whole.logits, FLOAT64, name)


@pytest.mark.parametrize("row, length", [(1, 9), (2, 7)])
def test_a_row_is_what_it_is_alone(row: int, length: int, x64: None) -> None:
    """Without the padding, and with its own images only: one in row 1, none, and no argument for them, in row 2."""
    config = TIED
    params = cases.random_params(config, "float64")
    inputs = cases.texts(padding_side="right", config=config) | cases.embedded_images(config)
    alone = {name: inputs[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
    assert alone["attention_mask"].all() and not inputs["attention_mask"][row, length:].any()
    if images := cases.IMAGES[row]:
        alone["perceiver_embeddings"] = inputs["perceiver_embeddings"][row : row + 1, :images]
        alone["image_attention_mask"] = inputs["image_attention_mask"][row : row + 1, :length, :images]
    one, batch = (cases.forward(model_of(config), params, cases.to_jax(each, "float64")) for each in (alone, inputs))
    assert_close(batch.logits[row : row + 1, :length], one.logits, FLOAT64)


def run(config: IdeficsConfig, dtype: str = "float64", inputs: Any = None, params: Any = None, **options: Any) -> Any:
    """((loss, output), gradients by layer); the images as what the tower makes of them."""
    params = cases.random_params(config, dtype) if params is None else params
    inputs = cases.texts(padding_side="left", config=config) | cases.embedded_images(config) | (inputs or {})
    arrays = cases.to_jax(inputs | {"labels": cases.labels(inputs, config)}, dtype)
    params = cases.stacked(params) if options.get("scan_layers") else params
    result, gradients = jax.device_get(cases.loss_and_gradients(model_of(config, dtype, **options))(params, arrays))
    return result, unstack_params(gradients)


WAYS = [(name, True, "none") for name in cases.WHOLE]  # a scan over blocks of one, two and three layers
WAYS += [("plain", False, "full"), ("plain", True, "full"), ("tied", False, "dots"), ("tied", True, "dots_no_batch")]


@pytest.mark.parametrize("name, scan, remat", WAYS)
def test_scan_and_recomputation_change_nothing(name: str, scan: bool, remat: str, x64: None) -> None:
    config = cases.WHOLE[name]
    expected = run(config)
    found = run(config, scan_layers=scan, remat=remat)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(lambda one, other: assert_close(one, other, FLOAT64, floor=1e-4 * largest), found, expected)


def test_recomputation_is_asked_for() -> None:
    inputs = cases.to_jax(cases.texts(), "float32")
    abstract = nn.meta.unbox(abstract_params(model_of(cases.RESAMPLED, "float32")))

    def program(remat: Any) -> str:
        model = model_of(cases.RESAMPLED, "float32", remat=remat)
        return str(jax.make_jaxpr(lambda params: model.apply({"params": params}, **inputs).logits)(abstract))

    asked_for = "prevent_cse=True"  # norms and activations are computed again always, without it
    assert asked_for in program("full") and asked_for not in program("none")


@pytest.mark.parametrize("name", cases.WHOLE)
def test_stacked_parameters_are_those_of_a_scan(name: str) -> None:
    loop, scan = (
        nn.meta.unbox(abstract_params(IdeficsForVisionText2Text(cases.WHOLE[name], scan_layers=scan)))
        for scan in (False, True)
    )

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.shape, tree)

    assert shapes(jax.eval_shape(stack_params, loop)) == shapes(scan)
    assert shapes(jax.eval_shape(unstack_params, scan)) == shapes(loop)
    params = cases.random_params(cases.WHOLE[name], "float32")
    jax.tree.map(np.testing.assert_array_equal, unstack_params(stack_params(params)), params)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_dropout(scan: bool) -> None:
    config = replace(TIED, dropout=0.3)
    params = cases.random_params(config, "float32")
    params = cases.stacked(params) if scan else params
    arrays = cases.to_jax(cases.texts(config=config) | cases.embedded_images(config), "float32")
    model = model_of(config, "float32", scan_layers=scan)

    @jax.jit
    def noisy(seed: int) -> Any:
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, **arrays, deterministic=False, rngs=rngs, output_attentions=True)

    off = cases.forward(model, params, arrays).logits
    np.testing.assert_array_equal(off, cases.forward(model.clone(config=TIED), params, arrays).logits)
    outputs = [jax.device_get(noisy(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)
    assert np.abs(outputs[0].logits - outputs[2].logits).max() > 0.1 < np.abs(outputs[0].logits - off).max()
    for weights in outputs[0].attentions:  # of a query and the tokens up to its own
        assert 0.2 < (weights[0][:, *np.tril_indices(11)] == 0).mean() < 0.4
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply({"params": params}, **arrays, deterministic=False))


def test_dropout_of_everything_leaves_the_embeddings() -> None:
    config = replace(PLAIN, dropout=1.0)
    params = cases.random_params(config, "float32")
    arrays = cases.to_jax(cases.texts(config=config) | cases.embedded_images(config), "float32")

    @jax.jit
    def states(params: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        model = model_of(config, "float32")
        return model.apply(
            {"params": params}, **arrays, deterministic=False, rngs=rngs, output_hidden_states=True
        ).hidden_states

    embedded, *middle, _ = states(params)
    for each in middle:
        np.testing.assert_array_equal(each, embedded)


@pytest.mark.parametrize("scan, remat", [(False, "dots"), (True, "full")])
def test_recomputation_drops_the_same(scan: bool, remat: Any, x64: None) -> None:
    """Else gradients would be of another function than the loss: here they are its slope."""
    config = replace(TIED, dropout=0.3)
    params = cases.random_params(config, "float64")
    params = jax.device_get(cases.stacked(params) if scan else params)
    arrays = cases.to_jax(cases.texts(config=config) | cases.embedded_images(config), "float64")
    model = model_of(config, scan_layers=scan, remat=remat)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        labels = arrays["input_ids"]
        return model.apply({"params": params}, **arrays, labels=labels, deterministic=False, rngs=rngs).loss

    rng, step = np.random.default_rng(6), 1e-6
    way = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    ahead, back = (loss(jax.tree.map(lambda leaf, d, by=by: leaf + by * d, params, way))[0] for by in (step, -step))
    slopes = jax.tree.map(np.vdot, jax.device_get(loss(params)[1]), way)
    assert_close((ahead - back) / (2 * step), sum(jax.tree.leaves(slopes)), 1e-6)


FORMS = {
    "pixel_values": cases.inputs(),
    "image_encoder_embeddings": cases.texts() | cases.embedded_images(PLAIN),
    "perceiver_embeddings": cases.embedded_images(TIED) | {"inputs_embeds": np.ones((4, 11, TIED.hidden_size))},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_more_digits_do_not_widen_what_is_computed(form: str, dtype: str, x64: None) -> None:
    model = IdeficsForVisionText2Text(cases.RESAMPLED, dtype=jnp.dtype(dtype))
    abstract = nn.meta.unbox(abstract_params(model))
    arrays = cases.to_jax(FORMS[form] | {"labels": cases.labels(cases.inputs())}, "float64")
    (loss, output), gradients = jax.eval_shape(cases.loss_and_gradients(model), abstract, arrays)
    assert loss.dtype == "float32" and {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}
    states = output.logits, output.image_hidden_states, *output.hidden_states
    assert {leaf.dtype.name for leaf in states} == {dtype}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_no_nan_where_there_is_nothing_to_see(dtype: str) -> None:
    """A row without images, one whose tokens may look at none, and one of padding only."""
    with jax.enable_x64(dtype == "float64"):
        mask = cases.texts(padding_side="left")["attention_mask"]
        looks = cases.images()["image_attention_mask"]
        mask[3], looks[1] = 0, 0
        params = cases.random_params(cases.RESAMPLED, dtype)
        table = params["model"]["embed_tokens"]["embedding"]
        for zero in (False, True):  # as padding starts, and norms of it divide by epsilon alone
            params["model"]["embed_tokens"]["embedding"] = table.at[0].multiply(1 - zero)
            inputs = {"attention_mask": mask, "image_attention_mask": looks}
            for leaf in jax.tree.leaves(run(cases.RESAMPLED, dtype, inputs, params)):
                assert np.isfinite(leaf.astype(float)).all()
        result, gradients = run(cases.RESAMPLED, dtype, {"attention_mask": 0 * mask})
        assert result[0] == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_the_mask_is_never_spread_over_image_tokens(implementation: str) -> None:
    """8 images of 64 tokens: arrays of scores are as wide as that, but none of truth values has memory of its own."""
    tokens, number, latents = 320, 8, 64
    model = model_of(TIED, "float32", attention_implementation=implementation)
    params = jax.eval_shape(lambda: cases.random_params(TIED, "float32"))
    inputs = {
        "input_ids": jax.ShapeDtypeStruct((2, tokens), jnp.int32),
        "perceiver_embeddings": jax.ShapeDtypeStruct((2, number, latents, 20), jnp.float32),
        "image_attention_mask": jax.ShapeDtypeStruct((2, tokens, number), jnp.int32),
    }
    program = jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs).logits)
    text = program.lower(params, inputs).compile().as_text()
    fused = set(re.findall(r"calls=%([\w.-]+)", text))
    wide = set()
    for computation in re.split(r"\n(?=\S)", text):
        name = re.match(r"(?:ENTRY )?%([\w.-]+)", computation)
        if name and name[1] not in fused:
            arrays = re.findall(r"(\w+)\[([\d,]+)\]", computation)
            wide |= {kind for kind, shape in arrays if {str(tokens), str(number * latents)} <= set(shape.split(","))}
    assert wide == {"f32"}


IDS = jnp.ones((2, 5), jnp.int32)
MASK = jnp.ones((2, 5, 3), jnp.int32)
PICTURES = jnp.zeros((2, 3, 30, 30, 3))
LATENTS = jnp.zeros((2, 3, 6, 20))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of input_ids or inputs_embeds"),
    ({"input_ids": IDS, "inputs_embeds": jnp.zeros((2, 5, 36))}, "exactly one of input_ids or inputs_embeds"),
    ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, r"attention_mask has shape \(2, 4\): expected \(2, 5\)"),
    ({"input_ids": IDS, "pixel_values": PICTURES}, "images need an image_attention_mask"),
    ({"input_ids": IDS, "image_attention_mask": MASK}, "came without images"),
    ({"pixel_values": PICTURES, "perceiver_embeddings": LATENTS}, "at most one of pixel_values"),
    ({"pixel_values": PICTURES[0]}, r"expected \[batch, images, height, width, 3\]"),
    ({"pixel_values": PICTURES.transpose(0, 1, 4, 2, 3)}, r"transpose\(0, 1, 3, 4, 2\)"),
    ({"pixel_values": PICTURES[:, :, 1:]}, r"\(29\*30\) doesn't match model \(30\*30\)"),
    ({"perceiver_embeddings": LATENTS[:1]}, "expected 2 rows as of text"),
    ({"perceiver_embeddings": LATENTS[:, :0]}, "leave images out for text alone"),
    ({"perceiver_embeddings": LATENTS[:, :2]}, r"has shape \(2, 5, 3\): expected \(2, 5, 2\)"),
    ({"perceiver_embeddings": LATENTS, "image_attention_mask": MASK[:, :4]}, r"expected \(2, 5, 3\)"),
    ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels have shape \(2, 4\)"),
    ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 2}, r"logits of \(2, 2\) tokens were kept"),
    ({"input_ids": IDS, "logits_to_keep": jnp.int32(2)}, "an int that jit does not trace"),
]


@pytest.mark.parametrize("inputs, message", WRONG, ids=[message for _, message in WRONG])
def test_arguments_that_do_not_belong_together(inputs: dict[str, Any], message: str, unchecked_types: None) -> None:
    model = IdeficsForVisionText2Text(cases.RESAMPLED)
    given = inputs if "input_ids" in inputs or not inputs else {"input_ids": IDS, "image_attention_mask": MASK} | inputs
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.apply({"params": cases.random_params(cases.RESAMPLED, "float32")}, **given))


def test_embeddings_of_a_resampler_that_is_not_there(unchecked_types: None) -> None:
    params = cases.random_params(PLAIN, "float32")
    with pytest.raises(ValueError, match="use_resampler should be True"):
        model_of(PLAIN, "float32").apply(
            {"params": params}, IDS, perceiver_embeddings=LATENTS, image_attention_mask=MASK
        )


def test_a_full_cache_is_refused() -> None:
    model, params = model_of(TIED, "float32"), cases.random_params(TIED, "float32")
    with pytest.raises(ValueError, match="the cache has 4 slots, 0 of them used: 5 new tokens do not fit"):
        model.apply({"params": params}, IDS, cache=model.init_cache(2, 4))
