"""What GLM-4V takes in: chats about pictures, in the layout that it was tuned on (THUDM's `tokenization_chatglm.py`).

B prompts   T tokens   I pictures of the prompt that has most   H height   W width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from flax_vlm.processing.byte_pairs import GLM4_BEGINNING
from flax_vlm.processing.images import ImageProcessor
from flax_vlm.processing.prompts import (
    Picture,
    Prompt,
    Transform,
    as_batch,
    checked,
    naming,
    paired,
    picture,
    pixels_of,
    runs,
)
from flax_vlm.processing.tokenizer import Tokenizer

# What stands for a picture. The one in the middle is the padding too: attention_mask tells them apart.
PICTURE = ("<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>")
ROLES = ("system", "user", "assistant", "observation")


class Turn(NamedTuple):
    """A message as the layout has it: pictures, then text."""

    role: str
    text: str
    pictures: Sequence[Picture] = ()
    metadata: str = ""


@dataclass(frozen=True)
class GLM4VProcessor:
    """Chats to the arrays that GLM4VModel takes, on the host, in numpy.

    A prompt is a chat, with THUDM's messages or with lists as content; or what one person says, a text or a list of
    pictures and a text, which the model is then to answer:

        [{"role": "user", "image": "dog.png", "content": "Who is this?"}]
        [{"role": "user", "content": [{"type": "image", "image": "dog.png"}, {"type": "text", "text": "Who is this?"}]}]
        [Path("dog.png"), "Who is this?"]

    A picture is a PIL image, a uint8 array [H, W, 3], the bytes of a picture file or its `pathlib.Path`; a string is a
    path only where no text can stand. The layout has the pictures of a message in front of its text. glm-4v-9b was
    tuned on one, in the first turn; the model takes several and later ones too.
    """

    tokenizer: Tokenizer

    # What the layout has in front of an answer, and the model says: the end of the line of the metadata.
    answer_begins = "\n"

    @classmethod
    def from_dir(cls, folder: str | Path) -> "GLM4VProcessor":
        """Reads a checkpoint folder in THUDM's layout, or one that `save` wrote.

        Raises:
          FileNotFoundError: for a folder without the files of the tokenizer.
        """
        return cls(Tokenizer.from_dir(folder))

    @cached_property
    def image_processor(self) -> ImageProcessor | None:
        """To a square of the `image_size` in tokenizer_config.json, not cropped; None for a model of text."""
        size = self.tokenizer.config.get("image_size")
        return None if size is None else ImageProcessor(size={"height": size, "width": size}, do_center_crop=False)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_dir` and transformers' AutoTokenizer read."""
        self.tokenizer.save(folder)

    def __call__(
        self,
        text: Prompt | Sequence[Prompt],
        images: Picture | Sequence[Picture | None] | None = None,
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        pad_images_to_multiple_of: int | None = None,
        add_generation_prompt: bool | None = None,
        transform: Transform | None = None,
    ) -> dict[str, Shaped[np.ndarray, "..."]]:
        """`input_ids` and `attention_mask` [B, T], `images` [B, H, W, 3]; [B, I, H, W, 3] where a prompt has several.

        A prompt of fewer than I pictures is filled up with zeros, which stand nowhere in its text. Where no prompt has
        a picture `images` is left out. Positions are not among these: the model counts them by the mask, as THUDM's
        tokenizer does.

        Args:
          text: one prompt or a list of prompts. A list of strings is one prompt of several texts.
          images: where `text` is one string a prompt: one picture or None for each.
          padding, padding_side, max_length, pad_to_multiple_of: as in `Tokenizer`; `max_length` is for
            padding="max_length", as nothing is cut off.
          pad_images_to_multiple_of: rounds I up, so that prompts of other numbers of pictures run the same program.
          add_generation_prompt: ends a prompt with `<|assistant|>`, for the model to go on; by default those that are
            no chats.
          transform: from an RGB picture to an array [H, W, 3], instead of the image processor; for training.
        """
        prompts = as_batch(text) if images is None else _with_images(text, images)
        rows, pictures = [], []
        for number, prompt in enumerate(prompts):
            with naming(number):
                turns, is_chat = _read(prompt)
                answers = not is_chat if add_generation_prompt is None else add_generation_prompt
                rows.append(self._ids(turns, answers))
                pictures.append([each for turn in turns for each in turn.pictures])
        out: dict[str, np.ndarray] = self.tokenizer.pad(rows, padding, padding_side, max_length, pad_to_multiple_of)
        most = max(map(len, pictures))
        if pad_images_to_multiple_of:
            most = -(-most // pad_images_to_multiple_of) * pad_images_to_multiple_of
        if most:
            if self.image_processor is None:
                raise ValueError(
                    "expected texts alone, got pictures: tokenizer_config.json has no image_size. Is this GLM-4V?"
                )
            out["images"] = _single(pixels_of(pictures, most, self.image_processor, transform))
        return out

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids; special tokens that are kept stand between spaces, as in the reference.

        For ids that come one by one there is `flax_vlm.processing.TextStream`.
        """
        if skip_special_tokens:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        special = self.tokenizer.backend.get_added_tokens_decoder()
        row = np.atleast_1d(np.asarray(ids)).tolist()
        # Each special token by itself, what is between two of them together.
        stretches = groupby(enumerate(row), lambda place: place[0] if place[1] in special else -1)
        return " ".join(self.tokenizer.decode([index for _, index in stretch]) for _, stretch in stretches)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def _ids(self, turns: Sequence[Turn], answers: bool) -> list[int]:
        ids = [self._special(token) for token in GLM4_BEGINNING]
        for turn in turns:
            ids.append(self._special(f"<|{turn.role}|>"))
            ids += self.tokenizer.ordinary_ids(turn.metadata + "\n")
            ids += [self._special(token) for token in PICTURE * len(turn.pictures)]
            ids += self.tokenizer.ordinary_ids(turn.text)
        return [*ids, self._special("<|assistant|>")] if answers else ids

    def _special(self, token: str) -> int:
        index = self.tokenizer.backend.token_to_id(token)
        if index is None:
            raise ValueError(
                f"tokenizer: expected the token {token}, which this prompt needs, got a vocabulary without it. Copy "
                "tokenizer_config.json from the original checkpoint."
            )
        return index


def _single(images: Float[np.ndarray, "B I H W 3"]) -> Float[np.ndarray, "B *I H W 3"]:
    return images[:, 0] if images.shape[1] == 1 else images


def _with_images(texts: Any, images: Any) -> list[Prompt]:
    return [[text] if image is None else [picture(image), text] for text, image in paired(texts, images)]


def _read(prompt: Any) -> tuple[list[Turn], bool]:
    """The turns of a prompt of any kind, and whether it is a chat."""
    items = [prompt] if isinstance(prompt, str) else prompt
    if any(isinstance(item, Mapping) for item in items):
        return [_turn(message) for message in items], True
    parts = [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item}
        for item in map(checked, items)
    ]
    return [Turn("user", *_split(runs(parts)))], False


def _turn(message: Any) -> Turn:
    match message:
        case {"role": "system" | "user" | "assistant" | "observation" as role, "content": content, **others}:
            image, metadata = others.pop("image", None), others.pop("metadata", "")
        case _:
            raise ValueError(
                f'chat: expected messages {{"role": one of {", ".join(ROLES)}, "content": ...}}, got '
                f"{shortened(message)}. Correct it."
            )
    if others:
        raise ValueError(
            f'chat: expected "image" and "metadata" besides role and content, got {sorted(others)}. GLM-4V was not '
            "tuned on tools: leave them out."
        )
    text, pictures = _split(runs(content))
    if image is not None:
        pictures = [picture(image), *pictures]
    if pictures and role != "user":
        raise ValueError(f"chat: expected pictures in what the user says, got one of {role}. Move it there.")
    return Turn(role, text, pictures, metadata)


def _split(items: Sequence[str | Picture]) -> tuple[str, list[Picture]]:
    """The text, and the pictures, which have to precede it."""
    texts = [item for item in items if isinstance(item, str)]
    if texts and not (len(texts) == 1 and items[-1] is texts[0]):
        raise ValueError(
            "expected pictures and then one text, the order of GLM-4V's layout, got a picture behind the text "
            f"{shortened(texts[0])}. Put it in front."
        )
    return "".join(texts), [item for item in items if not isinstance(item, str)]
