"""Chat sessions: what they read, encode and compile, turn by turn, and what they say."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from flax_vlm import chat as chat_module
from flax_vlm import generation
from flax_vlm.chat import tokens_of_the_layout
from flax_vlm.pretrained import VLM
from tests.talkers import END, FAKE, IMAGE, tiny_glm4v, tiny_idefics

LIMIT = 8
PICTURES = list(np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8))
FAMILIES = pytest.mark.parametrize("family", ["idefics", "glm4v"])
# Compiling is most of the time. One family has all in `make test`; test_cli_talk.py talks with the other.
SLOWLY = pytest.mark.parametrize("family", [pytest.param("idefics", marks=pytest.mark.slow), "glm4v"])


@cache
def vlm(family: str) -> Any:
    return tiny_glm4v() if family == "glm4v" else tiny_idefics([FAKE, IMAGE, END])


def begin(family: str, messages: Any = (), **options: Any) -> Any:
    return vlm(family).chat(messages, **({"max_new_tokens": LIMIT, "length": 512, "piece": 16} | options))


def answer_of_generate(family: str, messages: Any, **options: Any) -> str:
    """Where all is read at once, pictures as pixels."""
    options |= {"max_new_tokens": LIMIT} | tokens_of_the_layout(vlm(family))
    inputs = vlm(family).processor(messages, add_generation_prompt=True)
    out = vlm(family).generate(**inputs, **options)
    return vlm(family).processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :]).strip()


class Work:
    """What was done: how many tokens each turn has read, how many pictures were encoded, what was really compiled."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.encoded = 0
        self.programs: Counter[str] = Counter()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    done = Work()
    stream, encode = generation.stream, VLM.encode_images

    def recorded_stream(model: Any, params: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        done.tokens.append(inputs["input_ids"].shape[1])
        return stream(model, params, inputs, *rest, **options)

    def recorded_encode(self: VLM, **inputs: Any) -> Any:
        done.encoded += 1
        return encode(self, **inputs)

    monkeypatch.setattr(chat_module.generation, "stream", recorded_stream)
    monkeypatch.setattr(VLM, "encode_images", recorded_encode)
    with xla_programs(done.programs):
        yield done


@contextmanager
def xla_programs(found: Counter[str]) -> Iterator[None]:
    """Counts what XLA compiles, by the name of the function, as jax itself tells it."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told = re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage())
            if told:
                found[told[1]] += 1

    logger, handler = logging.getLogger("jax"), Handler()
    logger.addHandler(handler)
    with jax.log_compiles():
        yield
    logger.removeHandler(handler)


@FAMILIES
def test_ten_turns_compile_three_programs(family: str, work: Work, compiled: Callable[[], int]) -> None:
    parts = vlm(family)
    longer = replace(parts.config, **({"seq_length": 1024} if family == "glm4v" else {}))
    new: Any = VLM(parts.model.clone(config=longer), parts.params, parts.processor, parts.generation_config)
    room: dict[str, Any] = {"max_new_tokens": LIMIT, "length": 512, "piece": 24}  # of no other test
    chat = new.chat(**room)
    words = "mouse dog red blue one two three cat on under".split()
    for turn, word in enumerate(words):
        chat.say(word + " red" * turn, PICTURES[turn // 2 : turn // 2 + 1] if turn in (2, 4, 6, 7) else [])
        if turn == 2:
            assert compiled() == 3
            assert [work.programs[name] for name in ("prefill", "decode", "_traced")] == [1, 1, 1]
            work.programs.clear()
    assert compiled() == 0
    assert not work.programs, "nothing at all should compile once a picture has come"
    assert work.encoded == 4

    said = chat.messages
    for turn in range(1, len(said), 2):
        *images, text = said[turn - 1]["content"]
        fresh = new.chat(said[: turn - 1], **room)
        assert fresh.say(text["text"], [image["image"] for image in images]).strip() == said[turn]["content"]
    assert compiled() == 0


@SLOWLY
def test_a_turn_reads_what_is_new(family: str, work: Work) -> None:
    chat = begin(family)
    for text, images in (("mouse", []), ("red", PICTURES[:2]), ("blue", []), ("two", PICTURES[2:3])):
        said = chat._read([*chat.messages, {"role": "user", "content": ""}])[0]["input_ids"].shape[1]
        chat.say(text, images)
        whole = chat._read(chat.messages[:-1])[0]["input_ids"].shape[1]
        # The turn's own tokens, those that end the answer before it, and the patches of its pictures.
        patches = 15 * len(images) if family == "glm4v" else 0
        assert work.tokens[-1] <= whole - said + patches + 8
    assert work.tokens[-1] < len(chat._ids) / 2
    assert work.encoded == 3


@SLOWLY
def test_a_stopped_answer_is_gone_on_from(family: str, work: Work) -> None:
    for how in ("stop", "leave", "interrupt"):
        chat = begin(family)
        answer = chat.say("mouse", PICTURES[:1], stream=True)
        first = next(answer)
        if how == "stop":
            answer.stop()
            assert list(answer) == [] and chat.messages[-1] == {"role": "assistant", "content": first.strip()}
        elif how == "interrupt":
            with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
                patch.setattr(generation.Stream, "__next__", interrupted)
                next(answer)
            assert list(answer) == [] and answer.output is not None
        second = chat.say("dog")
        assert chat.messages[1]["content"] == first.strip()
        assert second.strip() == begin(family, chat.messages[:2]).say("dog").strip()
    # ... which reads no more than the end of the answer and the next turn.
    assert max(work.tokens[1::3]) < 16 < min(work.tokens[2::3])


def interrupted(_: Any) -> Any:
    raise KeyboardInterrupt


def test_an_answer_whose_state_is_lost_is_read_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = begin("glm4v")
    answer = chat.say("mouse", PICTURES[:1], stream=True)
    first, decode = next(answer), generation.api.decode

    def interrupted_later(*arguments: Any) -> Any:
        decode(*arguments)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(generation.api, "decode", interrupted_later)
        next(answer)
    assert answer.output is None and chat.messages[-1]["content"] == first.strip()
    second = chat.say("dog")
    assert work.tokens[1] > 16 and work.encoded == 1, "all tokens again, no picture"
    assert second == begin("glm4v", chat.messages[:2]).say("dog")


def test_a_session_after_a_mistake_is_as_before(work: Work) -> None:
    chat = begin("glm4v")
    chat.say("mouse")
    before = chat.messages
    for text, images, message in (
        ("a" * 300, [], "seq_length"),
        ("dog", ["nowhere.png"], "nowhere.png"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            chat.say(text, images)
    assert chat.messages == before
    answer = chat.say("dog")
    assert work.tokens[-1] < 16
    assert answer == begin("glm4v", before).say("dog")


def test_reset(work: Work) -> None:
    chat = begin("glm4v", [{"role": "system", "content": "one"}])
    first = chat.say("mouse", PICTURES[:1])
    chat.say("dog", PICTURES[1:2])
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "one"}]
    assert chat.say("mouse", PICTURES[:1]) == first != begin("glm4v").say("mouse", PICTURES[:1])
    assert work.tokens[0] == work.tokens[2]


@SLOWLY
def test_room_is_doubled(family: str, work: Work, compiled: Callable[[], int]) -> None:
    turns = [("mouse", PICTURES[:1]), ("dog red two three", []), ("blue", PICTURES[1:3])]
    small, large = begin(family, length=32, num_images=1), begin(family)
    assert [small.say(*turn) for turn in turns] == [large.say(*turn) for turn in turns]
    assert work.encoded == 6, "the pictures of each once"
    assert compiled() >= 4, "larger rooms compile, and say so"


def test_answers_have_random_numbers_of_their_own() -> None:
    def sampled(seed: int) -> list[str]:
        chat = begin("glm4v", do_sample=True, temperature=9.0, seed=seed)
        return [chat.say("mouse"), chat.say("mouse")]

    assert sampled(1) == sampled(1) != sampled(2)
    options: dict[str, Any] = {"do_sample": True, "temperature": 9.0}
    first = begin("glm4v", **options, seed=5)
    first.say("mouse")
    assert first._config_of_turn().seed == 6


@pytest.mark.slow
def test_penalties_speak_of_the_whole_talk() -> None:
    chat = begin("idefics", repetition_penalty=1.5)
    chat.say("mouse", PICTURES[:1])
    chat.say("dog")
    said = chat.messages
    assert said[-1]["content"] == answer_of_generate("idefics", said[:-1], repetition_penalty=1.5)


@SLOWLY
def test_warmup(family: str, work: Work, compiled: Callable[[], int]) -> None:
    chat = begin(family, piece=8)
    chat.warmup()
    assert not chat.messages and compiled() > 0
    work.programs.clear()
    chat.say("mouse")
    chat.say("red", PICTURES[:1])
    assert compiled() == 0 and not work.programs


def test_what_cannot_be_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="end_of_utterance"):
        tiny_idefics([FAKE, IMAGE]).chat()
    for options, message in (
        ({"num_beams": 2}, "expected num_beams=1"),
        ({"length": 0}, "length: expected 1 or more, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"typical_p": 0.9}, "not known here"),
    ):
        with pytest.raises(ValueError, match=message):
            begin("glm4v", **options)
    parts = vlm("glm4v")
    with pytest.raises(ValueError, match="has no tokenizer"):
        VLM(parts.model, parts.params, None, parts.generation_config).chat()
    with pytest.raises(ValueError, match="does not generate text"):
        VLM(parts.model, parts.params, parts.processor).chat()
