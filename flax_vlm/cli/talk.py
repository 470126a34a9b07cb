"""Commands for people who talk with a model about pictures."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .app import app
from .rows import NONE, Options
from .weights import DType

Pictures = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
PLACE = "<image>"
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
    quantize: Literal["int8"] | None = None,
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
        quantize: Hold the weights in eight bits: half the memory of bfloat16.
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

        return answers.generate(model, output, template, rows, {"dtype": dtype, "quantize": quantize}, how)
    if rows != NONE or output or template:
        raise ValueError("--output, --template and options of data sets do nothing without --dataset: leave them out")
    prompted = interleave(prompt.replace("\\n", "\n"), image)
    from flax_vlm.chat import tokens_of_the_layout, without_beginning

    vlm = _load(model, dtype, quantize)
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
    for piece in without_beginning(vlm, pieces):
        print(piece, end="", flush=True)
    print()


@app.command
def chat(
    model: tyro.conf.Positional[str],
    /,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    seed: int | None = None,
    dtype: DType | None = None,
    quantize: Literal["int8"] | None = None,
) -> None:
    """Talk with a model in the terminal. /image PATH adds a picture to what you say next, /quit ends.

    Ctrl-C stops an answer.

    Args:
        model: A checkpoint of a model that chats: a folder (PyTorch or native) or a repository on the Hub.
        max_new_tokens: The longest answer.
        temperature: Sample with it; by default answers are chosen as the checkpoint says.
        seed: Of sampling.
        dtype: Of the computation; by default that of the checkpoint.
        quantize: Hold the weights in eight bits: half the memory of bfloat16.
    """
    from flax_vlm.processing import load_image

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    options |= {} if temperature is None else {"do_sample": True, "temperature": temperature}
    options |= {} if seed is None else {"seed": seed}
    talk = _load(model, dtype, quantize).chat(**options)
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
                answer = talk.say(line, pictures, stream=True)
                pictures = []
                _print(answer)
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


def _print(answer: Any) -> None:
    """The answer as it comes, which Ctrl-C stops."""
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()


def _load(model: str, dtype: str | None, quantize: Literal["int8"] | None) -> Any:
    from flax_vlm import from_pretrained

    vlm = from_pretrained(model, dtype=dtype, quantize=quantize)
    if vlm.generation_config is None:
        raise ValueError(f"{model} holds a {type(vlm.model).__name__}, which does not generate text")
    if vlm.processor is None:
        raise ValueError(f"{model}: expected the files of a tokenizer beside the weights. Copy them from the original")
    return vlm


def _next_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return None
