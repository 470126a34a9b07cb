"""Prompts that mix texts and pictures, as every family of models takes them: what a person may pass, and what not."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from flax_vlm.processing.images import ImageProcessor, load_image

Picture = Path | bytes | Image.Image | np.ndarray
Message = Mapping[str, Any]
Prompt = str | Sequence[str | Picture] | Sequence[Message]
Transform = Callable[[Image.Image], Any]

# Stands for a picture while words are counted; the picture itself is opened once, and only if its words are kept.
BLANK = np.zeros((1, 1, 3), np.uint8)

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://[^\s/?#]\S*")


def as_batch(prompts: Any) -> list[Prompt]:
    """One prompt or a list of prompts as a list of them; a list of strings is one prompt of several texts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise TypeError(
            f"text: expected a str, a prompt or a list of prompts, got {type(prompts).__name__}. Wrap it in []."
        )
    are_lists = {isinstance(prompt, list | tuple) for prompt in prompts}
    if len(are_lists) != 1:
        came = "lists beside other things" if are_lists else "an empty list"
        raise ValueError(f"text: expected one prompt, or a list of lists, got {came}. Make each prompt a list.")
    return list(prompts) if True in are_lists else [prompts]


def paired(texts: Any, images: Any) -> list[tuple[str, Any]]:
    """Each text with what `images` has for it."""
    texts = [texts] if isinstance(texts, str) else texts
    images = images if isinstance(images, list | tuple) else [images]
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError("text: expected a str for each of images, got other things. Put pictures in text or in images.")
    if len(texts) != len(images) or not texts:
        raise ValueError(
            f"images: expected one for each text, got {len(images)} for {len(texts)}. For several pictures a text pass "
            "a list of lists."
        )
    return list(zip(texts, images, strict=True))


def checked(item: Any) -> str | Picture:
    """A text or a picture of a prompt that is a list."""
    if isinstance(item, str):
        _refuse_address(item)
    elif not isinstance(item, Picture):
        raise TypeError(
            f"expected texts and pictures (PIL, a uint8 array, bytes, a Path), got {type(item).__name__}. For a "
            "tensor pass np.asarray(x), uint8 and channels last."
        )
    return item


def runs(content: Any) -> list[str | Picture]:
    """The parts of a message's content, texts that follow each other as one."""
    parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    found: list[str | Picture] = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                last = found[-1] if found else None
                found = [*found[:-1], last + text] if isinstance(last, str) else [*found, text]
            case {"type": "image", "image": image} | {"type": "image", "path": image} | {"type": "image", "url": image}:
                found.append(picture(image))
            case _:
                raise ValueError(
                    'chat: expected a str or a list of {"type": "text", "text": ...} and {"type": "image", "image": '
                    f"...}} as content, got {shortened(part)}. Correct it."
                )
    return found


def blanked(prompt: Any) -> tuple[Any, list[Picture]]:
    """A prompt with blanks for pictures, and the pictures. With `transform=no_pixels` nothing of it is opened."""
    pictures: list[Picture] = []

    def blank(image: Any) -> np.ndarray:
        pictures.append(image)
        return BLANK

    def without(item: Any) -> Any:
        match item:
            case {"type": "image", "image": image}:
                return {**item, "image": blank(image)}
            case {"content": list(parts)}:
                return {**item, "content": [without(part) for part in parts]}
            case str() | Mapping():
                return item
        return blank(item)

    return (prompt, []) if isinstance(prompt, str) else ([without(item) for item in prompt], pictures)


def no_pixels(_image: Any) -> np.ndarray:
    """A `transform` for prompts whose pictures are blanks."""
    return BLANK


def picture(source: Any) -> Picture:
    """Where nothing but a picture can stand, a str is its path."""
    if isinstance(source, str):
        _refuse_address(source)
        return Path(source)
    return source


def pixels_of(
    rows: Sequence[Sequence[Picture]], most: int, processor: ImageProcessor, transform: Transform | None
) -> Float[np.ndarray, "B I H W 3"]:
    """The pictures of each prompt, filled up with zeros to `most`."""
    processed = []
    for number, row in enumerate(rows):
        with naming(number):
            processed.append([_process(each, processor, transform) for each in row])
    shapes = {pixels.shape for row in processed for pixels in row}
    shapes = shapes or {processor(np.zeros((1, 1, 3), np.uint8)).shape[1:]}
    if len(shapes) > 1:
        raise ValueError(f"expected pictures of one size, got {sorted(shapes)}. Resize them in transform.")
    out = np.zeros((len(processed), most, *shapes.pop()), np.float32)
    for i, row in enumerate(processed):
        for j, pixels in enumerate(row):
            out[i, j] = pixels
    return out


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Errors say which prompt of the batch they are about."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        error.add_note(f"This is about prompt {number}, counted from 0.")
        raise


def _process(source: Picture, processor: ImageProcessor, transform: Transform | None) -> Float[np.ndarray, "H W 3"]:
    if transform is None:
        return processor([source])[0]
    pixels = np.asarray(transform(load_image(source)), np.float32)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(
            f"transform: expected an array [height, width, 3], channels last, got {pixels.shape}. After "
            "torchvision's ToTensor add lambda x: x.permute(1, 2, 0)."
        )
    return pixels


def _refuse_address(text: str) -> None:
    """The reference would download what it finds there."""
    if _ADDRESS.fullmatch(text.strip()):
        raise ValueError(
            f"expected a text or a picture, got the address {text.strip()}. Download it and pass its Path."
        )
