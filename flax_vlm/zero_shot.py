"""Classifying pictures by sentences (CLIP, arXiv:2103.00020, 3.1).

N pictures   L labels
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from flax_vlm.inference import PictureVectors, TextVectors, embed
from flax_vlm.pretrained import VLM


def classify(
    vlm: VLM, images: Sequence[Any], labels: Sequence[str], *, template: str = "{}", batch_size: int = 32
) -> Float[np.ndarray, "N L"]:
    """The probability of each label for each picture: a softmax over the model's scaled cosines.

    Args:
      images: whatever `processing.load_image` takes.
      template: the sentence to put a label in, "a photo of {}" say.

    Raises:
      ValueError: for a template without a place for the label, or fewer than two labels.
    """
    if "{}" not in template:
        raise ValueError(f"template {template!r}: expected {{}} where the label goes, as in 'a photo of {{}}'")
    if len(labels) < 2:
        raise ValueError(f"expected at least two labels to choose from, came {len(labels)}")
    texts = embed(TextVectors(vlm), [template.replace("{}", label) for label in labels], batch_size)
    pictures = embed(PictureVectors(vlm), images, batch_size)
    logits = np.exp(np.float32(vlm.params["logit_scale"])) * pictures @ texts.T
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)
