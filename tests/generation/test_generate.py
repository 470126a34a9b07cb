"""generate as its callers meet it: buckets, caches to go on from, seeds, dtypes, errors, and how often it compiles."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.generation import GenerateOutput, GenerationConfig, api, bucket_length, generate
from flax_vlm.generation.api import begin_request
from flax_vlm.generation.loop import decode
from flax_vlm.generation.request import make_request
from flax_vlm.layers import few_rows
from flax_vlm.layers.few_rows import for_few_rows
from flax_vlm.layers.kv_cache import KeyValue, KVCache
from flax_vlm.layers.quantized import quantize_params
from tests.generation.test_stop_strings import word_tokenizer
from tests.generation.tiny import PAD, VOCAB, TinyDecoder, prompts, random_params

MODEL = TinyDecoder()
PARAMS = random_params(MODEL)
PROMPTS = prompts(5, 9, 2)
WIDTH = 9


def run(inputs: Any = PROMPTS, cache: Any = None, bucket: Any = bucket_length, **options: Any) -> GenerateOutput:
    config = GenerationConfig(**({"pad_token_id": PAD, "max_new_tokens": 12} | options))
    return generate(MODEL, PARAMS, inputs, config, cache=cache, bucket=bucket)


def stop_ids(out: GenerateOutput) -> list[int]:
    """Ids that end the rows of `out` at different steps."""
    return [int(out.sequences[0, WIDTH + 4]), int(out.sequences[1, WIDTH + 7])]


def left_aligned(rows: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of ids, padded on the left."""
    width = max(len(row) for row in rows)
    ids = np.stack([np.pad(row, (width - len(row), 0), constant_values=PAD) for row in rows])
    return {"input_ids": ids, "attention_mask": np.arange(width) >= width - np.array([[len(row)] for row in rows])}


def test_greedy_is_the_best_word_of_a_whole_forward_pass_again_and_again() -> None:
    @jax.jit
    def forward(ids: Any, mask: Any) -> Any:
        return MODEL.apply({"params": PARAMS}, ids, mask).logits[:, -1]

    width = WIDTH + 12
    ids = np.pad(PROMPTS["input_ids"], ((0, 0), (12, 0)))
    mask = np.pad(PROMPTS["attention_mask"], ((0, 0), (12, 0)))
    for _ in range(12):
        best = np.asarray(forward(ids, mask).argmax(-1))
        ids = np.concatenate([ids[:, 1:], best[:, None]], axis=1)
        mask = np.concatenate([mask[:, 1:], np.ones((3, 1), int)], axis=1)
    out = run().sequences[:, WIDTH:]
    np.testing.assert_array_equal(out, ids[:, width - 12 :])
    assert len(np.unique(out)) > 5


def test_buckets() -> None:
    lengths = (1, 16, 17, 33, 64, 65, 129, 1024, 1025, 2049, 4000)
    assert [bucket_length(n) for n in lengths] == [16, 16, 32, 64, 64, 128, 192, 1024, 1152, 2304, 4096]
    assert all(n <= bucket_length(n) <= max(n + 63, n * 9 // 8) for n in range(1, 5000))
    np.testing.assert_array_equal(run(bucket=None).sequences, run().sequences)


def test_what_compiles(compiled: Any) -> None:
    def sampled(length: int, rows: int = 7, **options: Any) -> None:
        defaults: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "eos_token_id": 3, "repetition_penalty": 1.2}
        run(prompts(*[length] * rows), **(defaults | options))

    sampled(5)
    assert compiled() == 2  # the prefill and the loop
    sampled(14, max_new_tokens=16, temperature=0.3, top_p=0.5, top_k=3, seed=9, eos_token_id=5, min_new_tokens=2)
    sampled(16, repetition_penalty=0.9, pad_token_id=4)
    assert compiled() == 0
    run(prompts(*[6] * 7), eos_token_id=3)  # greedy, after the same prefill
    assert compiled() == 1
    sampled(17)
    assert compiled() == 2
    sampled(5, cache=MODEL.init_cache(7, 64, jnp.float32))  # the loop of the 64 slots that the longer prompt had
    assert compiled() == 1
    sampled(5, rows=6)
    assert compiled() == 2


def test_the_last_token_is_not_read_unless_the_cache_is_wanted(compiled: Any) -> None:
    two = run(prompts(*[5] * 9), max_new_tokens=2, output_scores=True)
    assert compiled() == 2
    one = run(prompts(*[5] * 9), max_new_tokens=1, output_scores=True)
    np.testing.assert_array_equal(one.sequences, two.sequences[:, :-1])
    assert one.scores is not None and two.scores is not None and (one.scores.shape[0], two.scores.shape[0]) == (1, 2)
    run(prompts(*[5] * 10), max_new_tokens=1)
    assert compiled() == 1, "the prefill; there is no loop"
    out = run(prompts(*[5] * 10), max_new_tokens=1, return_dict_in_generate=True)
    assert compiled() == 1, "the loop"
    assert out.cache is not None and out.cache.may_attend.sum(1).tolist() == [6] * 10


def test_beams_of_other_worth_do_not_compile(compiled: Any) -> None:
    options: dict[str, Any] = {"num_beams": 2, "eos_token_id": 3}
    run(prompts(*[5] * 11), **options)
    assert compiled() == 2
    run(prompts(*[4] * 11), **options, length_penalty=2.0, early_stopping="never", num_return_sequences=2)
    run(prompts(*[4] * 11), **options, early_stopping=True, max_new_tokens=7)
    assert compiled() == 0


@pytest.mark.parametrize(
    "dtype, prepare, width",
    [
        (jnp.float32, dict, 64),
        (jnp.bfloat16, dict, 64),
        (jnp.bfloat16, quantize_params, 1024),
        (jnp.bfloat16, partial(for_few_rows, rows=1), 1024),
    ],
    ids=["float32", "bfloat16", "int8", "bits of bfloat16"],
)
def test_the_loop_needs_no_second_copy_of_weights_or_cache(dtype: Any, prepare: Any, width: int) -> None:
    """Not of other dtype either: XLA likes to widen weights once for all tokens."""
    model = TinyDecoder(vocab=4096, width=width, dtype=dtype)
    params = prepare(random_params(model))
    config = GenerationConfig(max_new_tokens=200)
    request = make_request(model, prompts(5, 9), config)
    state = begin_request(model, params, request)
    lowered = decode.lower(model, request.plan, params, request.options, state, np.int32(200))
    memory = lowered.compile().memory_analysis()
    weights, cache = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, state.cache))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < weights / 4


def test_bfloat16() -> None:
    model = TinyDecoder(dtype=jnp.bfloat16)
    params = random_params(model)
    for options in ({}, {"num_beams": 3}):
        config = GenerationConfig(max_new_tokens=5, output_scores=True, return_dict_in_generate=True, **options)
        out = generate(model, params, PROMPTS, config)
        assert out.sequences.shape == (3, WIDTH + 5)
        assert (out.sequences < VOCAB).all()
        assert out.scores is not None and out.scores.dtype == jnp.float32
        if out.cache is not None:
            assert out.cache.layers[0].key.dtype == jnp.bfloat16


def test_bfloat16_of_a_row_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "LARGE", 0)
    model = TinyDecoder(dtype=jnp.bfloat16)
    params = random_params(model)
    config = GenerationConfig(max_new_tokens=9, output_scores=True)
    of_bits = [generate(model, params, prompts(*lengths), config) for lengths in ([7], [5, 9])]
    monkeypatch.setattr(api, "for_few_rows", lambda params, rows: params)
    of_floats = [generate(model, params, prompts(*lengths), config) for lengths in ([7], [5, 9])]
    for found, expected in zip(of_bits, of_floats, strict=True):
        assert found.scores is not None and expected.scores is not None
        np.testing.assert_array_equal(found.sequences, expected.sequences)
        np.testing.assert_allclose(found.scores, expected.scores, atol=0.05 * np.abs(expected.scores).max())


@pytest.mark.usefixtures("x64")
def test_where_float64_is_on() -> None:
    for options in ({}, {"num_beams": 3, "output_scores": True}, {"do_sample": True, "seed": 1, "top_p": 0.9}):
        assert run(**options).sequences.shape == (3, WIDTH + 12)


def test_going_on_from_a_cache() -> None:
    stops = stop_ids(run())
    options: dict[str, Any] = {"eos_token_id": stops, "return_dict_in_generate": True}
    first = run(cache=MODEL.init_cache(3, 128, jnp.float32), **options)
    assert len(set(first.lengths.tolist())) > 1
    said = [row[mask > 0] for row, mask in zip(PROMPTS["input_ids"], PROMPTS["attention_mask"], strict=True)]
    cache = first.cache
    for turn in range(2):
        new = prompts(3, 1, 4, seed=turn + 1)
        answers = first.sequences[:, -(first.sequences.shape[1] - first_width(turn)) :]
        for row in range(3):
            own = answers[row, : first.lengths[row]]
            said[row] = np.concatenate([said[row], own, new["input_ids"][row, 4 - (3, 1, 4)[row] :]])
        first = run(new, cache=cache, **options)
        cache = first.cache
        whole = left_aligned(said)
        expected = run(whole, **options)
        np.testing.assert_array_equal(first.sequences[:, 4:], expected.sequences[:, whole["input_ids"].shape[1] :])
        np.testing.assert_array_equal(first.lengths, expected.lengths)


def first_width(turn: int) -> int:
    """Columns of the prompt of the turn before."""
    return WIDTH if turn == 0 else 4


def test_beams_go_on_from_a_cache() -> None:
    first = run(cache=MODEL.init_cache(3, 128, jnp.float32))
    said = {"input_ids": first.sequences, "attention_mask": np.ones((3, WIDTH + 12), int)}
    said["attention_mask"][:, :WIDTH] = PROMPTS["attention_mask"]
    new = prompts(2, 2, 2, seed=1)
    out = run(new, cache=first.cache, num_beams=3)
    whole = {name: np.concatenate([said[name], new[name]], axis=1) for name in new}
    np.testing.assert_array_equal(out.sequences[:, 2:], run(whole, num_beams=3).sequences[:, WIDTH + 14 :])
    assert out.cache is None


def test_a_cache_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="20 slots, 0 of them used: 9 tokens and 12 new ones do not fit"):
        run(cache=MODEL.init_cache(3, 20, jnp.float32))
    with pytest.raises(ValueError, match="the cache has 2 rows, and there are 3 prompts"):
        run(cache=MODEL.init_cache(2, 64, jnp.float32))
    out = run(cache=MODEL.init_cache(3, 21, jnp.float32))  # to the last slot: no room for a bucket
    np.testing.assert_array_equal(out.sequences, run().sequences)
    assert out.cache is not None and int(out.cache.index) == 21
    with pytest.raises(ValueError, match="21 of them used"):
        run(prompts(1, 1, 1), cache=out.cache, max_new_tokens=1)


def test_rows_of_a_cache() -> None:
    cache = KVCache.create(2, 4, [1], 1).admit(jnp.asarray([[False, True], [True, True]]))
    values = jnp.arange(8.0).reshape(2, 4, 1, 1)
    cache = cache.advance(2, [KeyValue(values, -values)]).replace(cross_mask=jnp.asarray([[True], [False]]))
    repeated = cache.rows(jnp.asarray([1, 0, 0]))
    assert repeated.layers[0].key[:, 0, 0, 0].tolist() == [4, 0, 0]
    assert repeated.may_attend[:, 0].tolist() == [True, False, False]
    assert repeated.cross_mask is not None and repeated.cross_mask[:, 0].tolist() == [False, True, True]
    assert int(repeated.index) == 2
    moved = cache.reorder(jnp.asarray([1, 1]), start=jnp.int32(2), length=2)
    assert moved.layers[0].value[..., 0, 0].tolist() == [[0, -1, -6, -7], [-4, -5, -6, -7]]
    assert (moved.may_attend == cache.may_attend).all()


def test_the_cache_stays_where_it_is() -> None:
    def places(cache: Any) -> list[int]:
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]

    cache = MODEL.init_cache(3, 64, jnp.float32)
    before = places(cache)
    assert places(run(cache=cache).cache) == before
    with pytest.raises(ValueError, match=r"used up by the call it was given to: go on from that one's output\.cache"):
        run(cache=cache)


def test_the_cache_comes_back_when_asked_for() -> None:
    assert run().cache is None
    assert run(return_dict_in_generate=True).cache is not None
    assert run(return_dict_in_generate=True, num_beams=2).cache is None


def test_a_row_depends_on_its_own_seed_only() -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0}
    together = run(**options, seed=[7, 8, 9])
    np.testing.assert_array_equal(run(**options, seed=[7, 8, 9]).sequences, together.sequences)
    for row, seed in enumerate((7, 8, 9)):
        alone = {name: array[row : row + 1] for name, array in PROMPTS.items()}
        np.testing.assert_array_equal(run(alone, **options, seed=[seed]).sequences[0], together.sequences[row])
        np.testing.assert_array_equal(run(alone, **options, seed=seed).sequences[0], together.sequences[row])
    one_by_one = run(**options, seed=7)
    np.testing.assert_array_equal(one_by_one.sequences[0], together.sequences[0])
    same = {name: np.repeat(array[:1], 3, axis=0) for name, array in PROMPTS.items()}
    assert len(np.unique(run(same, **options, seed=7).sequences, axis=0)) == 3
    assert not (run(**options).sequences == run(**options).sequences).all()
    with pytest.raises(ValueError, match="seed names 2 numbers, and there are 3 prompts"):
        run(**options, seed=[1, 2])


def test_several_answers_to_each_prompt() -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    out = run(**options, seed=[7, 8, 9])
    assert out.sequences.shape[0] == 9
    np.testing.assert_array_equal(out.sequences[:, :WIDTH], np.repeat(PROMPTS["input_ids"], 3, axis=0))
    assert len(np.unique(out.sequences, axis=0)) == 9
    single = run(do_sample=True, temperature=3.0, seed=[7, 8, 9])
    np.testing.assert_array_equal(out.sequences[::3], single.sequences)


def test_finished_rows_are_filled() -> None:
    free = run()
    out = run(eos_token_id=stop_ids(free))
    assert len(set(out.lengths.tolist())) > 1
    for row, length, unstopped in zip(out.sequences, out.lengths, free.sequences, strict=True):
        np.testing.assert_array_equal(row[: WIDTH + length], unstopped[: WIDTH + length])
        assert (row[WIDTH + length :] == PAD).all()
    assert out.sequences.shape[1] == WIDTH + out.lengths.max()


def test_inputs_beside_the_words() -> None:
    pictures = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    out = run(PROMPTS | {"pictures": pictures, "negative": True}).sequences
    np.testing.assert_array_equal(out, run(PROMPTS | {"pictures": -pictures, "negative": None}, bucket=None).sequences)
    assert not (out == run().sequences).all()
    with pytest.raises(ValueError, match=r"pictures has shape \(3, 8\): expected \(3, 9\) in front, as input_ids"):
        run(PROMPTS | {"pictures": pictures[:, 1:]})


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"input_ids": None}, {}, r"generation begins with input_ids, got \['attention_mask'\]"),
        ({"input_ids": np.ones((3, 9))}, {}, "expected whole numbers .*, got float64 of shape"),
        ({"input_ids": np.ones((0, 9), int)}, {}, "expected whole numbers"),
        ({"attention_mask": None}, {}, f"input_ids hold the padding id {PAD}: pass attention_mask"),
        ({"attention_mask": np.ones((3, 8))}, {}, r"attention_mask has shape \(3, 8\), input_ids \(3, 9\)"),
        ({"attention_mask": np.arange(9) < np.array([[9], [7], [3]])}, {}, r"prompts \[1, 2\] end in padding.*'left'"),
        ({}, {"stop_strings": "a"}, "stop_strings need the tokenizer"),
        ({}, {"bad_words_ids": [[2, 40], [41]]}, r"bad_words_ids name \[40, 41\]: expected ids below 40"),
        ({}, {"max_new_tokens": None, "max_length": 9}, "the prompt has 9 tokens and max_length is 9"),
    ],
)
def test_what_cannot_be_done_is_said(inputs: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(PROMPTS | inputs, **options)


def test_without_a_mask_all_is_prompt() -> None:
    inputs = prompts(4, 4)
    ids_only = {"input_ids": inputs["input_ids"]}
    np.testing.assert_array_equal(run(ids_only).sequences, run(inputs).sequences)


def test_a_stop_string_may_begin_in_the_prompt() -> None:
    tokenizer = word_tokenizer(VOCAB)
    out = run()
    last, first = (tokenizer.id_to_token(int(out.sequences[0, i])) for i in (WIDTH - 1, WIDTH))
    config = GenerationConfig(max_new_tokens=12, pad_token_id=PAD, stop_strings=last + first)
    assert generate(MODEL, PARAMS, PROMPTS, config, tokenizer=tokenizer).lengths[0] == 1


@pytest.mark.slow
def test_on_a_mesh() -> None:
    script = Path(__file__).with_name("on_a_mesh.py")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the same answers" in done.stdout
