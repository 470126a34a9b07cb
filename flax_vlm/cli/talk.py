"""Commands for people who talk with a model about pictures."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from .app import app
from .rows import NONE, Options
from .weights import DType

Pictures = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
PLACE, END = "<image>", "<end_of_utterance>"
_HELP = "/image PATH adds a picture to what you say next, /quit ends"


@app.command
def generate(
    model: tyro.conf.Positional[str],
    /,
    prompt: str | None = None,
    image: Pictures = (),
    max_new_tokens: int = 64,
    num_beams: int = 1,
    temperature: float | None = None,
    seed: int | None = None,
    dtype: DType | None = None,
    output: Path | None = None,
    template: str | None = None,
    rows: Options = NONE,
) -> None:
    """Let a model go on from a text with pictures, or answer all records of a data set.

    Of a data set, each record is asked what it has for a question, in the model's layout of a chat, and a line of JSON
    says what came of it, in the order of the records. Killed, the same command goes on. Answers depend on no batch.

    Args:
        model: A checkpoint of a model that generates: a folder (PyTorch or native) or a repository on the Hub.
        prompt: The text. Each <image> in it is the place of a picture; without any they come first. \\n breaks a line.
        image: A picture file; again for each further one.
        max_new_tokens: How many tokens to add at most.
        num_beams: Search with so many beams; the answer then comes all at once.
        temperature: Sample with it; by default the likeliest token is taken.
        seed: Of sampling.
        dtype: Of the computation; by default that of the checkpoint.
        output: With --dataset, the .jsonl to write.
        template: With --dataset, a text to put each question in, with {} as its place, instead of a chat; or what to
            say behind pictures without a question.
    """
    if seed is not None and temperature is None:
        raise ValueError(f"--seed {seed} does nothing without --temperature: pass both, or neither")
    if (prompt is None) == (not rows.dataset):
        raise ValueError("expected --prompt for one answer or --dataset for many: pass one of them")
    if prompt is None:
        if output is None or image:
            raise ValueError("--dataset: expected --output, the .jsonl to write, and no --image, which records name")
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        if temperature is not None:
            how |= {"do_sample": True, "temperature": temperature, "seed": seed or 0}
        from . import answers

        return answers.generate(model, output, template, rows, dtype, how)
    if rows != NONE or output or template:
        raise ValueError("--output, --template and options of data sets do nothing without --dataset: leave them out")
    prompted = interleave(prompt.replace("\\n", "\n"), image)
    vlm = _load(model, dtype)
    inputs = vlm.processor(prompted)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams} | tokens_of_the_layout(vlm)
    options["do_sample"] = temperature is not None  # whatever the checkpoint says
    if temperature is not None:
        options |= {"temperature": temperature, "seed": seed}
    if num_beams > 1:
        sequences = vlm.generate(**inputs, **options).sequences
        pieces = iter([vlm.processor.decode(sequences[0, inputs["input_ids"].shape[1] :])])
    else:
        pieces = vlm.generate(**inputs, **options, stream=True)
    for piece in _answer(vlm, pieces):
        print(piece, end="", flush=True)
    print()


@app.command
def chat(model: tyro.conf.Positional[str], /, max_new_tokens: int = 256, dtype: DType | None = None) -> None:
    """Talk with a model in the terminal. /image PATH adds a picture to what you say next, /quit ends.

    Ctrl-C stops an answer.

    Args:
        model: A checkpoint of a model that chats: a folder (PyTorch or native) or a repository on the Hub.
        max_new_tokens: The longest answer.
        dtype: Of the computation; by default that of the checkpoint.
    """
    from flax_vlm.processing import load_image

    talk = _Chat(_load(model, dtype), max_new_tokens)
    pictures: list[Any] = []
    prompt = "> " if sys.stdin.isatty() else ""
    print(_HELP, file=sys.stderr)
    while (line := _next_line(prompt)) not in (None, "/quit"):
        command, _, path = line.partition(" ")
        try:
            if command == "/image" and path:
                pictures.append(load_image(Path(path.strip()).expanduser()))
            elif command.startswith("/") and command[1:].isalpha():
                print(f"{line}: {_HELP}", file=sys.stderr)
            elif line:
                talk.say(line, pictures)
                pictures = []
        except (ValueError, OSError) as error:  # the talk is as it was before
            print(error, file=sys.stderr)


def interleave(prompt: str, images: Sequence[Path]) -> list[str | Path]:
    """The prompt as a list of texts and pictures."""
    for image in images:
        if not image.is_file():
            raise ValueError(f"{image}: expected a picture file, there is none. Correct --image")
    first, *texts = prompt.split(PLACE)
    if not texts:
        return [*images, prompt]
    if len(texts) != len(images):
        raise ValueError(f"--prompt has {len(texts)} {PLACE}, {len(images)} --image came: expected as many")
    items: list[str | Path] = [first]
    for image, text in zip(images, texts, strict=True):
        items += [image, text]
    return [item for item in items if item != ""]


class _Chat:
    """The messages so far, and a cache that holds their tokens, so that the model reads no more than what is new.

    It reads all again where the cache is full, where an answer was stopped, and where the layout writes an answer in
    other tokens than the model did.
    """

    def __init__(self, vlm: Any, max_new_tokens: int) -> None:
        self._vlm = vlm
        self._limit = max_new_tokens
        self._options = {"max_new_tokens": max_new_tokens} | tokens_of_the_layout(vlm)
        self._messages: list[dict[str, Any]] = []
        self._forget()
        # What cannot be is said at once: too few tokens, a tokenizer that knows no chats.
        vlm.generation_config.updated(**self._options)
        self._read(self._messages_with("?", []))

    def say(self, text: str, pictures: Sequence[Any]) -> None:
        """Prints the answer as it comes."""
        import numpy as np

        from flax_vlm.generation import bucket_length

        messages = self._messages_with(text, pictures)
        inputs = self._read(messages)
        ids, known = inputs["input_ids"][0], len(self._ids)
        new = self._vlm.processor.after(inputs, known)
        room = 0 if self._cache is None else self._cache.length - int(self._cache.index)
        if known >= len(ids) or (ids[:known] != self._ids).any() or self._slots(new, len(ids)) > room:
            self._forget()
            new, known = inputs, 0
            slots = self._slots(new, len(ids))
            self._cache = self._vlm.model.init_cache(1, max(512, bucket_length(2 * slots)))  # for turns to come
        cache, self._cache = self._cache, None  # it is used up, and has to come back
        answer = ""
        try:
            stream = self._vlm.generate(**new, **self._options, cache=cache, stream=True)
            for piece in _answer(self._vlm, stream):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            self._forget()
        else:
            self._cache, said = stream.output.cache, stream.output.sequences[0, len(ids) - known :]
            self._ids = np.concatenate([ids, said])
        print()
        self._messages = [*messages, {"role": "assistant", "content": answer.strip()}]

    def _forget(self) -> None:
        self._cache: Any = None
        self._ids: Any = []  # what it holds, answers among them

    def _slots(self, inputs: Mapping[str, Any], tokens: int) -> int:
        """How many slots of a cache inputs and answer take; `tokens` are those of the whole talk."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        extra = getattr(self._vlm.model, "extra_slots", None)
        pictures = 0 if extra is None else extra(ids, mask, inputs, tokens + self._limit)
        return ids.shape[1] + pictures + self._limit

    def _messages_with(self, text: str, pictures: Sequence[Any]) -> list[dict[str, Any]]:
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
        return [*self._messages, {"role": "user", "content": content}]

    def _read(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        return self._vlm.processor(messages, add_generation_prompt=True)


def _load(model: str, dtype: str | None) -> Any:
    from flax_vlm import from_pretrained

    vlm = from_pretrained(model, dtype=dtype)
    if vlm.generation_config is None:
        raise ValueError(f"{model} holds a {type(vlm.model).__name__}, which does not generate text")
    if vlm.processor is None:
        raise ValueError(f"{model}: expected the files of a tokenizer beside the weights. Copy them from the original")
    return vlm


def tokens_of_the_layout(vlm: Any) -> dict[str, Any]:
    """Options by which the token that ends an utterance ends the answer, and those for pictures cannot be said."""
    tokenizer, config = vlm.processor.tokenizer, vlm.generation_config
    ids = {token: tokenizer.backend.token_to_id(token) for token in (END, *tokenizer.additional_special_tokens)}
    end = ids.pop(END)
    return {
        "eos_token_id": [*config.stop_ids, *([] if end is None else [end])],
        "bad_words_ids": [*(config.bad_words_ids or []), *([index] for index in ids.values() if index is not None)],
    }


def _answer(vlm: Any, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of an answer without what the layout has in front of it."""
    begins = vlm.processor.answer_begins
    for piece in pieces:
        yield piece.removeprefix(begins)
        begins = ""


def _next_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return None
