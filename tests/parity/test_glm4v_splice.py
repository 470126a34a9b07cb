"""Pictures among words: what the original cannot do, held to what it can.

A row is compared with the same row alone, and the slots with a loop over lists.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import generation
from flax_vlm.models.glm4v import GLM4VForConditionalGeneration
from flax_vlm.models.glm4v.splice import check_pictures, splice
from tests.parity import glm4v_cases as cases
from tests.tolerances import FLOAT64, assert_close

BOI, EOI, PAD = 310, 311, 300
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((4, 2, 112, 112, 3))


def words(count: int, start: int = 0) -> list[int]:
    return [10 + (7 * (start + i)) % 280 for i in range(count)]


PICTURE = [BOI, PAD, EOI]
ROWS = (
    words(3) + PICTURE + words(4, 3) + PICTURE + words(2, 9),  # two, the second one in a later turn
    PICTURE + words(6, 20),  # one, and padding
    words(11, 30),  # none
    words(2, 40) + PICTURE + PICTURE + words(1, 44),  # two in a row
)
COUNTS = (2, 1, 0, 2)


def batch(rows: Any = ROWS) -> dict[str, np.ndarray]:
    length = max(map(len, rows))
    ids = np.array([[PAD] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def as_jax(inputs: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(each) for name, each in inputs.items()}


def expanded(row: list[int], patches: int) -> list[tuple[int, int, int]]:
    """(position, picture, vector of it) of each slot, or -1 twice for a word."""
    slots, picture = [], -1
    for i, token in enumerate(row):
        if token == BOI:
            picture += 1
            slots.append((i, picture, 0))
        elif i and row[i - 1] == BOI:
            slots += [(i, picture, 1 + k) for k in range(patches)]
        else:
            slots.append((i, picture, patches + 1) if token == EOI else (i, -1, -1))
    return slots


@pytest.mark.parametrize("patches", [1, 5])
def test_slots_are_those_of_a_loop(patches: int) -> None:
    inputs = batch()
    is_token = inputs["attention_mask"] != 0
    place = jax.jit(partial(splice, begin=BOI, end=EOI, images=2, patches=patches))
    slots = place(jnp.asarray(inputs["input_ids"]), jnp.asarray(is_token))
    positions = slots.spread(jnp.asarray(inputs["attention_mask"].cumsum(-1) - 1))
    there = np.asarray(slots.spread(jnp.asarray(is_token)) & slots.is_there)
    assert bool(slots.fits.all()) and there.shape[1] == is_token.shape[1] + 2 * (patches - 1)
    for row, ids in enumerate(ROWS):
        expected = np.array(expanded(ids, patches))
        own = slice(there.shape[1] - len(expected), None)
        assert there[row, own].all() and not there[row, : -len(expected)].any()
        np.testing.assert_array_equal(positions[row, own], expected[:, 0])
        seen = expected[:, 1] >= 0
        np.testing.assert_array_equal(slots.is_picture[row, own], seen)
        vector = expected[:, 1] * (patches + 2) + expected[:, 2]
        np.testing.assert_array_equal(slots.vector[row, own][seen], vector[seen])
        inside = seen & (expected[:, 2] > 0) & (expected[:, 2] <= patches)
        np.testing.assert_array_equal(slots.is_patch[row, own], inside)
        assert not slots.is_patch[row, : -len(expected)].any()


def test_a_batch_of_all_kinds_is_its_rows_alone(x64: None) -> None:
    """With two pictures, one behind padding, none, and two that touch; so nobody feels the width of the others."""
    model, params = cases.model(), cases.params("float64")
    inputs = as_jax(batch() | {"images": IMAGES, "labels": np.full(batch()["input_ids"].shape, 7)})
    (_, together), gradients = cases.loss_and_gradients(model)(params, inputs)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    assert together.logits.shape[1] == 15 + 2 * 15
    losses, counts = [], []
    for row, ids in enumerate(ROWS):
        alone: dict[str, Any] = {"input_ids": np.array([ids]), "labels": np.full((1, len(ids)), 7)}
        if COUNTS[row]:
            alone["images"] = IMAGES[row : row + 1, : COUNTS[row]]
        expected = cases.forward(model, params, as_jax(alone))
        own = expected.logits.shape[1]
        assert_close(together.logits[row, -own:], expected.logits[0], FLOAT64, f"row {row}")
        counts.append(len(ids) - 1 - COUNTS[row])
        losses.append(float(expected.loss) * counts[-1])
    assert_close(together.loss, sum(losses) / sum(counts), FLOAT64, "loss")


def test_unused_pictures_are_not_looked_at(x64: None) -> None:
    model, params = cases.model(), cases.params("float64")
    other = IMAGES.copy()
    other[1, 1] = other[2] = RNG.standard_normal((112, 112, 3))
    one, two = (cases.forward(model, params, as_jax(batch() | {"images": each})) for each in (IMAGES, other))
    np.testing.assert_array_equal(one.logits, two.logits)
    other[1, 0] += 1
    changed = cases.forward(model, params, as_jax(batch() | {"images": other}))
    assert (np.abs(changed.logits - one.logits)[1, -10:] > 1e-3).any()


def test_text_padded_on_the_left(x64: None) -> None:
    """The original cannot: it stretches the mask as if there were a picture."""
    model, params = cases.model(), cases.params("float64")
    rows = (ROWS[2], words(5, 60))
    together = cases.forward(model, params, as_jax(batch(rows)))
    for row, ids in enumerate(rows):
        alone = cases.forward(model, params, as_jax({"input_ids": np.array([ids])}))
        assert_close(together.logits[row, -len(ids) :], alone.logits[0], FLOAT64, f"row {row}")


def test_a_cache_goes_on_where_the_positions_do(x64: None) -> None:
    """The whole prompt at once, and in parts of which the second brings the second picture and the last one word."""
    model, params = cases.model(), cases.params("float64")
    row = ROWS[0]
    whole = cases.forward(model, params, as_jax({"input_ids": np.array([row]), "images": IMAGES[:1]}))
    cache, logits = model.init_cache(1, 60), []
    for part, image in ((row[:9], IMAGES[:1, 0]), (row[9:14], IMAGES[:1, 1]), (row[14:], None)):
        inputs = as_jax({"input_ids": np.array([part])} | ({} if image is None else {"images": image}))
        out = cases.forward(model, params, inputs | {"cache": cache})
        cache = out.cache
        logits.append(out.logits)
    assert_close(jnp.concatenate(logits, axis=1), whole.logits, FLOAT64, "logits")
    assert cache.next_position.tolist() == [15] and int(cache.index) == 45


def test_a_conversation_of_two_rows() -> None:
    """One brings its picture in the first turn, one in the second; both say what they would, asked for all at once."""
    model, params = cases.model("float32"), cases.params("float32")
    options = generation.GenerationConfig(max_new_tokens=4, pad_token_id=PAD)
    images = IMAGES[:2, :1].astype(np.float32)
    cache, sequences, masks = model.init_cache(2, 96), [], []
    for rows in ((ROWS[0][:9], words(5, 60)), (words(4, 70), words(2, 80) + PICTURE + words(2, 90))):
        inputs = batch(rows)
        out = generation.generate(model, params, inputs | {"images": images}, options, cache=cache)
        cache = out.cache
        sequences.append(out.sequences)
        masks.append(np.pad(inputs["attention_mask"], ((0, 0), (0, 4)), constant_values=1))
    ids, mask = np.concatenate(sequences, axis=1), np.concatenate(masks, axis=1)
    said = cases.forward(model, params, as_jax({"input_ids": ids, "attention_mask": mask, "images": images}))
    likeliest = np.asarray(said.logits.argmax(-1))
    np.testing.assert_array_equal(likeliest[:, -5:-1], sequences[1][:, -4:])
    np.testing.assert_array_equal(likeliest[1, 8:12], sequences[0][1, -4:])  # its picture comes later


FAULTY = {
    "no end": [BOI, PAD, 12, 13],
    "at the end of the row": [10, 11, BOI],
    "three": PICTURE * 3,
    "one in another": [BOI, BOI, EOI, EOI, 10],
}


@pytest.mark.parametrize("fault", FAULTY)
def test_ids_that_do_not_fit_the_pictures(fault: str) -> None:
    """An error where ids are known; under jit the row is NaN, and no other one is."""
    inputs = batch((FAULTY[fault], ROWS[0]))
    with pytest.raises(ValueError, match=r"row 0 of input_ids has \d begins of a picture \(310\)"):
        check_pictures(inputs["input_ids"], inputs["attention_mask"] != 0, BOI, EOI, 2)
    model, params = cases.model("float32"), cases.params("float32")
    arrays = as_jax(inputs | {"images": IMAGES[:2].astype(np.float32)})
    logits = cases.forward(model, params, arrays).logits
    assert np.isnan(logits[0, -1]).all() and np.isfinite(logits[1]).all()
    with pytest.raises(ValueError, match="row 0 of input_ids"):
        generation.generate(model, params, arrays, generation.GenerationConfig(max_new_tokens=2))


def test_what_does_not_belong_together(unchecked_types: None) -> None:
    config = cases.config()
    model = cases.model("float32")
    ids, image = np.array([ROWS[1]]), np.zeros((1, 112, 112, 3), np.float32)
    faults: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": ids, "images": image[0]}, r"images have shape \(112, 112, 3\): expected \[1, height"),
        ({"input_ids": ids, "images": np.concatenate([image, image])}, "Rows of text alone need pictures too"),
        ({"input_ids": ids, "images": image.transpose(0, 3, 1, 2)}, "channels-first as in PyTorch"),
        ({"input_ids": ids, "images": image[:, :98]}, "98 x 112 pixels: expected 112 x 112"),
        ({"input_ids": ids, "attention_mask": ids[:, :4]}, r"attention_mask has shape \(1, 4\): expected \(1, 9\)"),
        ({"input_ids": ids, "labels": ids, "logits_to_keep": 3}, "all logits kept"),
        ({"input_ids": ids, "logits_to_keep": np.zeros((1, 2), int)}, "expected an int that jit does not trace"),
        ({}, "expected input_ids, with images or without"),
        ({"inputs_embeds": np.zeros((1, 2, 64), np.float32), "images": image}, "or else inputs_embeds"),
    ]
    params = cases.params("float32")
    for inputs, message in faults:
        arrays = {name: each if isinstance(each, int) else jnp.asarray(each) for name, each in inputs.items()}
        run = partial(model.apply, **arrays)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, {"params": params})
    known = (
        ({"input_ids": ids, "position_ids": ids * 0 + 128}, "position 128: expected less than seq_length, 128"),
        ({"input_ids": np.zeros((1, 129), int)}, "position 128"),
        ({"input_ids": ids[:, :2], "images": image}, "row 0 of input_ids has 1 begins"),
    )
    for inputs, message in known:
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, **as_jax(inputs))
    text_model = GLM4VForConditionalGeneration(replace(config, vision_config=None))
    with pytest.raises(ValueError, match="this is a text model"):
        text_model.apply({"params": params}, jnp.asarray(ids), images=jnp.asarray(image))
    options = generation.GenerationConfig(max_new_tokens=120)
    with pytest.raises(ValueError, match="need 129 positions: expected at most seq_length, 128"):
        generation.generate(model, params, {"input_ids": ids, "images": image}, options)
