"""Scikit-learn's handwritten digits: 1,797 real pictures of 8 x 8 pixels, a fixed split of them, and augmentation.

The pictures are the test set of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
doi:10.24432/C50P49, CC BY 4.0), white ink on black.
"""

import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HELD_OUT = 360
SPLIT_SEED = 0
SIZE = 32  # of the pictures that the model sees


class Digits(NamedTuple):
    """`images` is uint8 [A, 8, 8], `labels` uint8 [A]."""

    images: np.ndarray
    labels: np.ndarray


def load() -> tuple[Digits, Digits]:
    """The training pictures and the 360 held-out ones, both with the ten digits in equal parts."""
    pixels, labels = load_digits(return_X_y=True)  # pixels from 0 to 16
    images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return split(Digits(images, labels.astype(np.uint8)), HELD_OUT)


def split(digits: Digits, count: int) -> tuple[Digits, Digits]:
    """All but `count` of the pictures, and these, always the same."""
    rest, taken = train_test_split(
        np.arange(len(digits.labels)), test_size=count, stratify=digits.labels, random_state=SPLIT_SEED
    )
    return Digits(digits.images[rest], digits.labels[rest]), Digits(digits.images[taken], digits.labels[taken])


def augment(rng: np.random.Generator, image: np.ndarray) -> bytes:
    """A PNG of `image` a little turned, zoomed, sheared and shifted, at the size that the model sees."""
    return png(turned(rng, image, SIZE))


def turned(rng: np.random.Generator, image: np.ndarray, size: int) -> Image.Image:
    """`image` a little turned, zoomed, sheared and shifted, enlarged to `size`."""
    angle, shear = rng.uniform(-0.25, 0.25), rng.uniform(-0.15, 0.15)
    zoom_x, zoom_y = rng.uniform(0.85, 1.15, 2)
    shift_x, shift_y = rng.uniform(-size / 10, size / 10, 2)
    # Where a pixel of the result comes from: around the centre, turned and sheared, then shifted.
    a, b = math.cos(angle) / zoom_x, (math.sin(angle) + shear) / zoom_x
    c, d = -math.sin(angle) / zoom_y, math.cos(angle) / zoom_y
    middle = size / 2
    matrix = (a, b, middle - (a + b) * middle + shift_x, c, d, middle - (c + d) * middle + shift_y)
    large = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return large.transform(large.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
