"""What IDEFICS takes in: prompts that mix texts and pictures (transformers IdeficsProcessor; arXiv:2306.16527).

B prompts   T tokens   I pictures of the prompt that has most   H height   W width
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Shaped

from flax_vlm.processing.images import ImageProcessor, read_image_config
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

FAKE, IMAGE = "<fake_token_around_image>", "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"


@dataclass(frozen=True)
class IdeficsProcessor:
    """Prompts to the arrays that IdeficsModel takes, on the host, in numpy.

    A prompt is a list of texts and pictures in the order of reading, or a chat:

        ["User: Who is this?", Path("dog.png"), "<end_of_utterance>\\nAssistant:"]
        [{"role": "user", "content": [{"type": "text", "text": "Who is this?"}, {"type": "image", "image": "dog.png"}]}]

    A picture is a PIL image, a uint8 array [H, W, 3], the bytes of a picture file or its `pathlib.Path`; a string is a
    path only where no text can stand. Texts lose the spaces around them, and keep line breaks.
    """

    image_processor: ImageProcessor
    tokenizer: Tokenizer

    # What the layout of a chat has in front of an answer, and the model says.
    answer_begins = ""

    @classmethod
    def from_dir(cls, folder: str | Path) -> "IdeficsProcessor":
        """Reads a checkpoint folder of transformers 4.x or 5.x, or one that `save` wrote.

        Raises:
          FileNotFoundError: for a folder without the files of the tokenizer or of the image processor.
        """
        folder = Path(folder)
        image_config = read_image_config(folder)
        if not image_config:
            raise FileNotFoundError(
                f"{folder}: expected preprocessor_config.json, which says what becomes of pictures, found none. "
                "Copy it there from the original checkpoint."
            )
        image_processor = ImageProcessor.from_hf({"image_processor_type": "IdeficsImageProcessor"} | image_config)
        return cls(image_processor, Tokenizer.from_dir(folder))

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_dir` and transformers' IdeficsProcessor read."""
        self.tokenizer.save(folder)
        config = self.image_processor.to_hf("IdeficsImageProcessor") | {"processor_class": "IdeficsProcessor"}
        text = json.dumps(config, indent=2, sort_keys=True)
        (Path(folder) / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")

    def __call__(
        self,
        text: Prompt | Sequence[Prompt],
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        pad_images_to_multiple_of: int | None = None,
        add_eos_token: bool = False,
        add_end_of_utterance_token: bool | None = None,
        add_generation_prompt: bool = False,
        transform: Transform | None = None,
        dummy_image: bool = False,
    ) -> dict[str, Shaped[np.ndarray, "..."]]:
        """`input_ids` and `attention_mask` [B, T], `pixel_values` [B, I, H, W, 3], `image_attention_mask` [B, T, I].

        A prompt of fewer than I pictures is filled up with zeros, which no token attends. Where no prompt has a
        picture the last two are left out: the model needs no stand-in.

        Args:
          text: one prompt or a list of prompts. A list of strings is one prompt of several texts.
          images: as in transformers, where `text` is one string a prompt: one picture each, which precedes it, or a
            list of pictures each, which follow it.
          padding, padding_side, truncation, max_length, pad_to_multiple_of: as in `Tokenizer`. LLaMA's side is the
            left unless its files say otherwise. Where tokens are cut off, their pictures go too.
          pad_images_to_multiple_of: rounds I up, so that prompts of other numbers of pictures run the same program.
          add_eos_token: ends each prompt with `</s>`, for training.
          add_end_of_utterance_token: puts `<end_of_utterance>` between two texts of a list that follow each other; by
            default where the tokenizer lists it as special, which those of the instruct models do.
          add_generation_prompt: ends a chat with "\\nAssistant:", for the model to go on.
          transform: from an RGB picture to an array [H, W, 3], instead of the image processor; for training.
          dummy_image: one picture of zeros where no prompt has any, as the reference does.
        """
        prompts = as_batch(text) if images is None else _with_images(text, images)
        if add_end_of_utterance_token is None:
            add_end_of_utterance_token = END_OF_UTTERANCE in self.tokenizer.additional_special_tokens
        texts, pictures = [], []
        for number, prompt in enumerate(prompts):
            with naming(number):
                items = _read(prompt, add_end_of_utterance_token, add_generation_prompt)
                texts.append(self._with_tokens(items, add_eos_token))
                pictures.append([item for item in items if not isinstance(item, str)])
        out: dict[str, np.ndarray] = self.tokenizer(
            texts,
            padding=padding,
            padding_side=padding_side,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            add_special_tokens=False,
        )
        most = max(int(dummy_image), *map(len, pictures))
        if pad_images_to_multiple_of:
            most = -(-most // pad_images_to_multiple_of) * pad_images_to_multiple_of
        if most:
            ids, image_id = out["input_ids"], self.tokenizer.backend.token_to_id(IMAGE)
            if truncation:
                kept = (ids == image_id).sum(-1)
                from_end = self.tokenizer.truncation_side == "left"
                pictures = [row[len(row) - n :] if from_end else row[:n] for row, n in zip(pictures, kept, strict=True)]
            out["pixel_values"] = pixels_of(pictures, most, self.image_processor, transform)
            out["image_attention_mask"] = image_attention_mask(ids, image_id, self.tokenizer.eos_token_id, most)
        return out

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids. For ids that come one by one there is `flax_vlm.processing.TextStream`."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens)

    def _with_tokens(self, items: list[str | Picture], add_eos_token: bool) -> str:
        """The prompt as one text; pictures that follow each other share the token between them."""
        text, before = self.tokenizer.special_token("bos_token"), ""
        for item in items:
            if not isinstance(item, str):
                text += (FAKE if isinstance(before, str) else "") + IMAGE + FAKE
            elif IMAGE in item:
                raise ValueError(
                    f"expected pictures as items of the prompt, got {IMAGE} in a text, {shortened(item)}. Put the "
                    "picture itself there."
                )
            else:
                text += item.strip(" ")
            before = item
        unknown = [
            t for t in (FAKE, IMAGE, END_OF_UTTERANCE) if t in text and self.tokenizer.backend.token_to_id(t) is None
        ]
        if unknown:
            raise ValueError(
                f"tokenizer: expected the tokens {unknown}, which this prompt needs, got a vocabulary without them. "
                "Copy added_tokens.json or tokenizer.json from the original checkpoint; chats need an instruct model."
            )
        return text + (self.tokenizer.special_token("eos_token") if add_eos_token else "")


def image_attention_mask(
    input_ids: Int[np.ndarray, "B T"], image_token_id: int | None, eos_token_id: int | None, number_of_images: int
) -> Int32[np.ndarray, "B T I"]:
    """1 where a token attends an image: that of the latest `<image>`, until an `</s>` ends the text.

    <s> a  <fake> <image> <fake> <image> <fake> b  </s> c  <image>
    -   -  -      0       0      1       1      1  1    -  2
    """
    positions = np.arange(input_ids.shape[1])
    is_image = input_ids == image_token_id
    behind_end = np.pad(input_ids == eos_token_id, ((0, 0), (1, 0)))[:, :-1]
    last_image, last_end = (np.maximum.accumulate(np.where(at, positions, -1), -1) for at in (is_image, behind_end))
    latest = np.where(last_end > last_image, -1, np.cumsum(is_image, -1) - 1)
    return (latest[..., None] == np.arange(number_of_images)).astype(np.int32)


def _with_images(texts: Any, images: Any) -> list[Prompt]:
    return [
        [text, *map(picture, image)] if isinstance(image, list | tuple) else [picture(image), text]
        for text, image in paired(texts, images)
    ]


def _read(prompt: Any, add_end_of_utterance: bool, add_generation_prompt: bool) -> list[str | Picture]:
    """Texts and pictures of a prompt of any kind, `<end_of_utterance>` among them."""
    items = [prompt] if isinstance(prompt, str) else prompt
    if any(isinstance(item, Mapping) for item in items):
        return _read_chat(items, add_generation_prompt)
    if add_generation_prompt:
        raise ValueError('add_generation_prompt: expected a chat, got a list. End it with "\\nAssistant:" yourself.')
    out: list[str | Picture] = []
    for item in map(checked, items):
        if isinstance(item, str) and add_end_of_utterance and out and isinstance(out[-1], str):
            out.append(END_OF_UTTERANCE)
        out.append(item)
    return out


def _read_chat(messages: Sequence[Any], add_generation_prompt: bool) -> list[str | Picture]:
    """The layout that the instruct models were tuned on, as their model card and demo write it:

        A text of the system, if there is one.
        User:<picture>What is this?<end_of_utterance>
        Assistant: A dog.<end_of_utterance>
        User: Which one?<end_of_utterance>
        Assistant:

    A space follows the colon where a text does. Texts of a message that follow each other are joined as they are.
    """
    out: list[str | Picture] = []
    for message in messages:
        match message:
            case {"role": "system", "content": content} if not out:
                out += _stripped(content)
                continue
            case {"role": "user" | "assistant" as role, "content": content}:
                parts = _stripped(content)
            case _:
                raise ValueError(
                    'chat: expected messages {"role": "user" or "assistant", "content": ...}, before them perhaps one '
                    f'of "system", got {shortened(message)}. Correct it.'
                )
        speaker = ("\n" if out else "") + role.capitalize() + ":"
        match parts:
            case [str(first), *parts]:
                speaker += " " + first
        out += [speaker, *parts, END_OF_UTTERANCE]
    return [*out, "\nAssistant:"] if add_generation_prompt else out


def _stripped(content: Any) -> list[str | Picture]:
    return [run.strip(" ") if isinstance(run, str) else run for run in runs(content)]
