"""Commands for people who talk with a model about pictures."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from .app import app

Pictures = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
PLACE = "<image>"


@app.command
def generate(
    model: tyro.conf.Positional[str],
    /,
    prompt: str,
    image: Pictures = (),
    max_new_tokens: int = 64,
    num_beams: int = 1,
    temperature: float | None = None,
    seed: int | None = None,
    dtype: str | None = None,
) -> None:
    """Let a model go on from a text with pictures.

    Args:
        model: A checkpoint of a model that generates: a folder (PyTorch or native) or a repository on the Hub.
        prompt: The text. Each <image> in it is the place of a picture; without any they come first.
        image: A picture file; again for each further one.
        max_new_tokens: How many tokens to add at most.
        num_beams: Search with so many beams; the answer then comes all at once.
        temperature: Sample with it; by default the likeliest token is taken.
        seed: Of sampling.
        dtype: Of the computation; by default that of the checkpoint.
    """
    vlm = _load(model, dtype)
    inputs = vlm.processor(interleave(prompt, image))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature, "seed": seed}
    if num_beams > 1:
        sequences = vlm.generate(**inputs, **options).sequences
        print(vlm.processor.decode(sequences[0, inputs["input_ids"].shape[1] :]))
        return
    for piece in vlm.generate(**inputs, **options, stream=True):
        print(piece, end="", flush=True)
    print()


@app.command
def chat(model: tyro.conf.Positional[str], /, max_new_tokens: int = 256, dtype: str | None = None) -> None:
    """Talk with a model in the terminal. /image PATH adds a picture to what you say next, /quit ends.

    Args:
        model: A checkpoint of a model that chats: a folder (PyTorch or native) or a repository on the Hub.
        max_new_tokens: The longest answer.
        dtype: Of the computation; by default that of the checkpoint.
    """
    vlm = _load(model, dtype)
    messages: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    prompt = "> " if sys.stdin.isatty() else ""
    print("/image PATH adds a picture, /quit ends", file=sys.stderr)
    while (line := _next_line(prompt)) not in (None, "/quit"):
        if line.startswith("/image "):
            picture = Path(line.removeprefix("/image ").strip()).expanduser()
            if picture.is_file():
                pictures.append({"type": "image", "image": picture})
            else:
                print(f"{picture}: expected a picture file, there is none", file=sys.stderr)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": line}]})
        pictures = []
        inputs = vlm.processor(messages, add_generation_prompt=True)
        answer = ""
        for piece in vlm.generate(**inputs, max_new_tokens=max_new_tokens, stream=True):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]})


def interleave(prompt: str, images: tuple[Path, ...]) -> list[str | Path]:
    """The prompt as a list of texts and pictures."""
    texts = prompt.split(PLACE)
    if len(texts) == 1:
        return [*images, prompt]
    if len(texts) - 1 != len(images):
        raise ValueError(f"--prompt has {len(texts) - 1} {PLACE}, {len(images)} --image came: expected as many")
    items: list[str | Path] = [texts[0]]
    for image, text in zip(images, texts[1:], strict=True):
        items += [image, text]
    return [item for item in items if item != ""]


def _load(model: str, dtype: str | None) -> Any:
    from flax_vlm import from_pretrained

    vlm = from_pretrained(model, dtype=dtype)
    if vlm.generation_config is None:
        raise ValueError(f"{model} holds a {type(vlm.model).__name__}, which does not generate text")
    if vlm.processor is None:
        raise ValueError(f"{model}: expected the files of a tokenizer beside the weights. Copy them from the original")
    return vlm


def _next_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None
