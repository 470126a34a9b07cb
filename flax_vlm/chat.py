"""Talking with a model: a session that reads what is new and nothing twice.

Every turn lays the whole talk out as the model's slots, keeps what the cache holds of it, and reads the rest in pieces
of one width, with places for the same number of pictures, seen or not. So one program reads turns of every length, one
more says the answers, and one encodes a picture: three in all, until the talk outgrows its cache or these places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flax_vlm import generation
from flax_vlm.processing import TextStream, load_image

END = "<end_of_utterance>"
Message = Mapping[str, Any]


class ChatSession:
    """A talk with a model, as `vlm.chat()` begins it.

        chat = vlm.chat(max_new_tokens=64)
        chat.say("What is this?", images=["dog.png"])
        for piece in chat.say("And what is it doing?", stream=True):
            print(piece, end="")

    The cache stays between turns: only new tokens are read, from the first on that differs from what was read or said.
    A picture is encoded once in a session.

    A session that holds more than its room (`length` tokens, `num_images` pictures) doubles it, reads all tokens again
    and compiles again; the pictures stay encoded.

    Attributes:
      messages: what was said so far, as the processor takes it. To say something else, begin another session with them.
    """

    def __init__(
        self,
        vlm: Any,
        messages: Sequence[Message] = (),
        *,
        length: int = 2048,
        num_images: int = 4,
        piece: int = 64,
        **options: Any,
    ) -> None:
        """See `VLM.chat`, which makes one."""
        if vlm.generation_config is None:
            raise ValueError(f"{type(vlm.model).__name__} does not generate text: it cannot chat")
        if vlm.processor is None:
            raise ValueError("a chat needs the processor: the checkpoint has no tokenizer. Copy it from the original")
        for name, value in (("length", length), ("num_images", num_images), ("piece", piece)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        config = vlm.generation_config.updated(**options)
        if config.num_beams > 1 or config.num_return_sequences > 1:
            raise ValueError("a chat has one answer a turn, as it comes: expected num_beams=1, num_return_sequences=1")
        self._vlm = vlm
        self._config = config.updated(**tokens_of_the_layout(vlm, config))
        self._length, self._places, self._piece = length, num_images, piece
        self._begins = [dict(message) for message in messages]
        self._pool: dict[str, Any] = {}
        self.reset()
        self._read([*self._begins, _user("?", ())])  # a tokenizer that knows no chats says so at once

    @property
    def messages(self) -> list[Message]:
        """A copy. An answer is among them when it has come to its end."""
        return [*self._messages]

    def reset(self) -> None:
        """Back to the messages that the session began with; nothing compiles again."""
        self._answer: Answer | None = None
        self._messages: list[Message] = [*self._begins]
        self._turns = 0
        self._encoded = 0
        self._forget()

    def say(self, text: str, images: Sequence[Any] = (), *, stream: bool = False) -> str | Answer:
        """What the model answers.

        Args:
          images: pictures that come with the text, in front of it: whatever `processing.load_image` takes.
          stream: give the answer as it comes: an iterator over its pieces.

        Raises:
          ValueError, OSError: for what cannot be read or answered; the session is then as it was before.
        """
        self.stop()
        messages = [*self._messages, _user(text, [load_image(image) for image in images])]
        answer = self._begin(messages)
        if stream:
            return answer
        for _ in answer:
            pass
        return answer.text

    def warmup(self) -> None:
        """Compiles what turns of any length, with pictures and without, will need: no turn that fits compiles then."""
        twin = copy(self)
        twin._pool = {}
        twin.reset()
        sees = hasattr(self._vlm.model, "empty_encodings") and bool(self._vlm.model.empty_encodings(1, 1))
        picture = np.zeros((8, 8, 3), np.uint8)
        for _ in range(2):  # the second goes on from the first
            next(twin._begin([*twin._messages, _user("?", [picture] * sees)]), None)
            twin.stop()

    def stop(self) -> None:
        """Ends an answer that is still coming, and nothing else; see `Answer.stop`."""
        if self._answer is not None:
            self._answer.stop()

    def _begin(self, messages: list[Message]) -> Answer:
        inputs, pictures = self._read(messages)
        limit, _ = self._config.new_tokens(0, continued=True)
        self._make_room(inputs["input_ids"].shape[1] + limit, len(pictures))
        self._encode(pictures)
        model = self._vlm.model
        laid = model.lay_out(inputs, self._places) if hasattr(model, "lay_out") else inputs
        ids = laid["input_ids"][0]
        # One token at least is read, since the answer follows what the model makes of it.
        known = _alike(self._ids, ids[:-1])
        tokenizer = self._vlm.processor.tokenizer
        with self._vlm.placed():
            cache = self._cache_of(known, laid)
            try:
                stream = generation.stream(
                    model,
                    self._vlm.params,
                    {name: array[:, known:] for name, array in laid.items()} | self._pool,
                    self._config_of_turn(),
                    tokenizer=tokenizer,
                    cache=cache,
                    text_stream=partial(TextStream, tokenizer),
                    piece=self._piece,
                    history=inputs["input_ids"],
                )
            except BaseException:
                if not cache.index.is_deleted():  # nothing was read
                    self._cache, self._ids = cache, ids[:known]
                raise
        self._encoded = len(pictures)
        self._messages, self._turns = messages, self._turns + 1
        self._answer = Answer(self._vlm, stream, partial(self._keep, ids[:known]))
        return self._answer

    def _keep(self, known: np.ndarray, answer: Answer) -> None:
        """Takes in an answer that has come to its end."""
        self._answer = None
        self._messages.append({"role": "assistant", "content": answer.text.strip()})
        output = answer.output
        if output is not None:
            self._ids = np.concatenate([known, output.sequences[0]])
            self._cache = output.cache

    def _read(self, messages: Sequence[Message]) -> tuple[dict[str, np.ndarray], list[Any]]:
        """The processor's inputs without pixels, and the pictures themselves."""
        pictures: list[Any] = []

        def stand_in(picture: Any) -> np.ndarray:
            pictures.append(picture)
            return np.zeros((1, 1, 3), np.float32)

        inputs = self._vlm.processor(messages, add_generation_prompt=True, transform=stand_in)
        inputs.pop(getattr(self._vlm.model, "pixel_input", None), None)
        return inputs, pictures

    def _make_room(self, tokens: int, pictures: int) -> None:
        length, places = _doubled(self._length, tokens), _doubled(self._places, pictures)
        if (length, places) != (self._length, self._places):
            self._forget()
            self._length, self._places = length, places

    def _encode(self, pictures: Sequence[Any]) -> None:
        """Puts the new ones where the model looks for them."""
        model = self._vlm.model
        if not hasattr(model, "empty_encodings"):
            return
        with self._vlm.placed():
            if not self._pool:
                self._pool = self._settled(model.empty_encodings(1, self._places))
            for name, pool in self._pool.items():
                if pool.shape[1] < self._places:
                    more = self._settled(model.empty_encodings(1, self._places))[name]
                    self._pool[name] = lax.dynamic_update_slice_in_dim(more, pool, 0, axis=1)
            for place in range(self._encoded, len(pictures)):
                pixels = self._vlm.processor.image_processor([pictures[place]])[None]
                encoded = self._vlm.encode_images(**{model.pixel_input: pixels})
                for name, pool in self._pool.items():
                    self._pool[name] = lax.dynamic_update_slice_in_dim(pool, encoded[name], place, axis=1)

    def _cache_of(self, known: int, laid: Mapping[str, np.ndarray]) -> Any:
        """A cache that holds the first `known` slots. It is used up, and comes back with the answer."""
        cache = self._cache
        self._forget()
        if cache is None:
            model = self._vlm.model
            images = {"num_images": self._places} if self._pool else {}
            return self._settled(model.init_cache(1, self._length + self._piece, model.dtype, **images))
        positions = laid.get("position_ids")
        next_ones = None if positions is None else jnp.asarray(positions[:, known], jnp.int32)
        return self._settled(cache.rewind(known, next_ones))

    def _settled(self, arrays: Any) -> Any:
        """Where what the model gives back will be: else the next turn would compile the same program for that place."""
        mesh, leaf = self._vlm.mesh, jax.tree.leaves(self._vlm.params)[0]
        if mesh is None:
            return jax.device_put(arrays, leaf.sharding if isinstance(leaf, jax.Array) else jax.devices()[0])
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda array: array if isinstance(array.sharding, NamedSharding) else jax.device_put(array, everywhere),
            arrays,
        )

    def _config_of_turn(self) -> generation.GenerationConfig:
        """Each answer has random numbers of its own."""
        seed = self._config.seed
        return self._config if not isinstance(seed, int) else self._config.updated(seed=(seed + self._turns) % 2**32)

    def _forget(self) -> None:
        self._cache: Any = None
        self._ids = np.zeros(0, np.int32)  # what stands in its slots


class Answer(Iterator[str]):
    """An answer as it comes: an iterator over pieces of text.

    It ends where the model ends it, and where it is stopped: by `stop`, by an exception (Ctrl-C, say), or by the next
    turn. What was said until then is the answer that stands in the messages, and the next turn goes on from there.

    Attributes:
      text: what has come so far.
      output: the ids of this turn, as `generate` gives them; None where an exception took them away.
    """

    def __init__(self, vlm: Any, stream: generation.Stream, keep: Callable[[Answer], None]) -> None:
        self.text = ""
        self._vlm = vlm
        self._stream = stream
        self._pieces = without_beginning(vlm, stream)
        self._keep = keep
        self._is_coming = self._is_over = self._is_stopped = False

    def __next__(self) -> str:
        if self._is_over:
            raise StopIteration
        self._is_coming = True
        try:
            with self._vlm.placed():
                piece = next(self._pieces)
        except BaseException:  # the end among them
            self._is_stopped = True
            raise
        else:
            self.text += piece
            return piece
        finally:
            self._is_coming = False
            if self._is_stopped:
                self._end()

    def stop(self) -> None:
        """Ends it here; called by another thread while a piece is being made, behind that piece."""
        self._is_stopped = True
        if not self._is_coming:
            self._end()

    @property
    def output(self) -> generation.GenerateOutput | None:
        """See the class."""
        return None if self._stream.is_lost else self._stream.output

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._keep(self)


def without_beginning(vlm: Any, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of an answer without what the layout has in front of it."""
    begins = vlm.processor.answer_begins
    for piece in pieces:
        yield piece.removeprefix(begins)
        begins = ""


def tokens_of_the_layout(vlm: Any, config: generation.GenerationConfig | None = None) -> dict[str, Any]:
    """Options by which the token that ends an utterance ends the answer, and those for pictures cannot be said."""
    tokenizer, config = vlm.processor.tokenizer, vlm.generation_config if config is None else config
    assert config is not None, "the model generates"
    ids = {token: tokenizer.backend.token_to_id(token) for token in (END, *tokenizer.additional_special_tokens)}
    end = ids.pop(END)
    return {
        "eos_token_id": [*config.stop_ids, *([] if end is None else [end])],
        "bad_words_ids": [*(config.bad_words_ids or []), *([index] for index in ids.values() if index is not None)],
    }


def _user(text: str, pictures: Sequence[Any]) -> Message:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids both begin with."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _doubled(room: int, needed: int) -> int:
    while room < needed:
        room *= 2
    return room
