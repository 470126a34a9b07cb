"""What AltCLIP takes in: texts as ids, pictures as pixel values (transformers AltCLIPProcessor; arXiv:2211.06679).

B texts   T tokens   I images   H height   W width
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from flax_vlm.processing.images import ImageProcessor, ImageSource
from flax_vlm.processing.tokenizer import Tokenizer, read_json

IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
TEXT_FILES = ("tokenizer.json", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class AltCLIPProcessor:
    """Texts and pictures to the arrays that AltCLIPModel takes, on the host, in numpy.

    That of a tower has only its half, the other is None.
    """

    image_processor: ImageProcessor | None
    tokenizer: Tokenizer | None

    @classmethod
    def from_dir(cls, folder: str | Path) -> "AltCLIPProcessor":
        """Reads a checkpoint folder of transformers 4.x or 5.x, or one that `save` wrote.

        Raises:
          FileNotFoundError: for a folder with the files of neither half.
        """
        folder = Path(folder)
        configs = [read_json(folder / name) for name in IMAGE_FILES]
        image_config = next((config for config in configs if "image_processor" in config), configs[1])
        has_texts = any((folder / name).is_file() for name in TEXT_FILES)
        if not image_config and not has_texts:
            raise FileNotFoundError(
                f"{folder}: expected preprocessor_config.json for pictures and {' or '.join(TEXT_FILES)} for texts, "
                "found none. Copy them there from the original checkpoint."
            )
        tokenizer = None
        if has_texts:
            tokenizer = Tokenizer.from_dir(folder)
            limits = [tokenizer.model_max_length, _positions(read_json(folder / "config.json"))]
            tokenizer.model_max_length = min((limit for limit in limits if limit is not None), default=None)
        return cls(ImageProcessor.from_hf(image_config) if image_config else None, tokenizer)

    @property
    def max_text_length(self) -> int:
        """In tokens, `<s>` and `</s>` included; XLM-R's own 512 where the files set no limit."""
        limit = self.tokenizer.model_max_length if self.tokenizer else None
        return limit or 512

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_dir` and transformers' AltCLIPProcessor read."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        if self.image_processor is not None:
            config = self.image_processor.to_hf() | {"processor_class": "AltCLIPProcessor"}
            text = json.dumps(config, indent=2, sort_keys=True)
            (Path(folder) / IMAGE_FILES[1]).write_text(text + "\n", encoding="utf-8")

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageSource | Sequence[ImageSource] | None = None,
        padding: bool | str = True,
        truncation: bool = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Shaped[np.ndarray, "..."]]:
        """`input_ids` and `attention_mask` [B, T] for text, `pixel_values` [I, H, W, 3] for images.

        Long texts are cut to `max_length`, by default what the model takes, and keep their `</s>`. Give
        `pad_to_multiple_of` (32, say) where the texts change from call to call: shapes then repeat, and jit, which
        compiles once for every shape, does not compile again.
        """
        if text is None and images is None:
            raise ValueError("AltCLIPProcessor: expected text, images or both, got neither. Pass text= or images=.")
        out: dict[str, np.ndarray] = {}
        if text is not None:
            if self.tokenizer is None:
                raise ValueError(f"text: this checkpoint brings no tokenizer. Put {' or '.join(TEXT_FILES)} beside it.")
            if max_length is None and (truncation or padding == "max_length"):
                max_length = self.max_text_length
            out |= self.tokenizer(
                text,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
            )
            longest = int(out["attention_mask"].sum(-1).max())
            if longest > self.max_text_length:  # jax would give all tokens beyond the last position, and say nothing
                raise ValueError(
                    f"text: expected at most {self.max_text_length} tokens, for which the model has positions, got "
                    f"{longest}. Pass truncation=True, and no max_length above it."
                )
        if images is not None:
            if self.image_processor is None:
                raise ValueError(f"images: this checkpoint brings no image processor. Put {IMAGE_FILES[1]} beside it.")
            out["pixel_values"] = self.image_processor(images)
        return out


def _positions(config: dict[str, Any]) -> int | None:
    """How many tokens the text tower of config.json has positions for; they start behind the padding's row."""
    text_config = config.get("text_config") or config
    rows = text_config.get("max_position_embeddings")
    return None if rows is None else rows - text_config.get("pad_token_id", 1) - 1
