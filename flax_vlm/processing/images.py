"""From any picture to pixel values, with Pillow and numpy alone.

Every step does what transformers' CLIPImageProcessorPil and IdeficsImageProcessorPil (5.23) do, in the same order and
the same float type, so that the result is equal bit for bit; only the layout differs, channels last.

B images   H height   W width   C channels
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageOps

from flax_vlm.processing.tokenizer import read_json

ImageSource = str | Path | bytes | Image.Image | np.ndarray
Size = Mapping[str, int] | Sequence[int] | int  # a dict as in the configs, [height, width] or one number

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_image(source: ImageSource) -> Image.Image:
    """Opens a picture as a person would see it: upright, RGB, 8 bit.

    - The EXIF orientation is applied, also to a PIL image that still carries one.
    - Transparency (RGBA, LA, a palette or colour key) is composited on white. So does the reference's image processor
      in 5.x; 4.x, and its `load_image`, drop the alpha channel and show whatever colours lie beneath.
    - 16-bit grayscale keeps its upper 8 bits, as Pillow does with 16-bit RGB; a plain `convert("RGB")`, which the
      reference uses, would turn every value above 255 white.
    - An array is uint8, [H, W] or [H, W, 1 | 3 | 4], channels last.
    """
    return _to_rgb(_open(source))


@dataclass(frozen=True)
class ImageProcessor:
    """Resize, centre crop, rescale, normalise; the fields are those of preprocessor_config.json, the defaults CLIP's.

    `size` is {"shortest_edge": n}, which keeps the aspect ratio, or {"height": h, "width": w}, which does not; an int
    is the shortest edge, as in CLIP. `do_convert_rgb=False` refuses pictures that are not RGB already.
    """

    do_resize: bool = True
    size: Size = field(default_factory=lambda: {"shortest_edge": 224})
    resample: int = Image.Resampling.BICUBIC
    do_center_crop: bool = True
    crop_size: Size = field(default_factory=lambda: {"height": 224, "width": 224})
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] | float = CLIP_MEAN
    image_std: Sequence[float] | float = CLIP_STD
    do_convert_rgb: bool = True

    def __post_init__(self):
        canonical = {
            "size": _size(self.size, shortest_edge=True),
            "crop_size": _size(self.crop_size),
            "resample": int(Image.Resampling(self.resample)),
            "image_mean": _three_floats("image_mean", self.image_mean),
            "image_std": _three_floats("image_std", self.image_std),
        }
        for name, value in canonical.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ImageProcessor":
        """Reads preprocessor_config.json of any release, or a processor_config.json with an image_processor in it.

        IDEFICS writes `image_size`, the edge of a square to which pictures are resized and which is not cropped.
        """
        config = {key: value for key, value in config.get("image_processor", config).items() if value is not None}
        kind = config.pop("image_processor_type", config.pop("feature_extractor_type", "CLIPImageProcessor"))
        if kind not in _CLIP_PROCESSORS | _IDEFICS_PROCESSORS:
            raise ValueError(
                f"preprocessor_config.json: expected one of {sorted(_CLIP_PROCESSORS | _IDEFICS_PROCESSORS)}, got "
                f"{kind!r}, whose steps and defaults may differ. If they are CLIP's, remove image_processor_type."
            )
        if kind in _IDEFICS_PROCESSORS:
            config["size"] = _size(config.pop("image_size", config.get("size", 224)))
            config.setdefault("do_center_crop", False)
            if config.get("image_num_channels") == 3:
                del config["image_num_channels"]
        if config.pop("default_to_square", False) and isinstance(config.get("size"), int):
            config["size"] = {"height": config["size"], "width": config["size"]}
        known = {f.name for f in fields(cls)}
        unknown = {k: v for k, v in config.items() if k not in known | _DECORATION and v is not False}
        if unknown:
            raise ValueError(
                f"preprocessor_config.json: expected {sorted(known)}, got also {unknown}, which may change the pixels "
                "and is not implemented. Remove it if it does not matter."
            )
        return cls(**{key: value for key, value in config.items() if key in known})

    def to_hf(self, kind: str = "CLIPImageProcessor") -> dict[str, Any]:
        """The content of a preprocessor_config.json that transformers 4.x and 5.x read; `kind` is a class of 4.x."""
        config = asdict(self) | {"image_processor_type": kind}
        if kind in _IDEFICS_PROCESSORS:
            size = _size(self.size)
            if size["height"] == size["width"]:  # 4.x knows squares only, and only by this name
                config |= {"image_size": size["height"], "image_num_channels": 3}
        return config

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Float[np.ndarray, "B H W 3"]:
        """Pixel values of one picture or of several; a uint8 array [B, H, W, C] counts as several."""
        if isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4):
            pixels = [self._process(image) for image in images]
        else:
            pixels = [self._process(images)]
        if not pixels:
            raise ValueError(
                "images: expected one picture or more, got an empty list. For text alone leave images out."
            )
        if len({image.shape for image in pixels}) > 1:
            raise ValueError(
                f"images: expected equal sizes after resizing, got {[image.shape[:2] for image in pixels]}. "
                "Set do_center_crop=True, or give size a height and a width."
            )
        return np.stack(pixels)

    def _process(self, source: Any) -> Float[np.ndarray, "H W 3"]:
        image = _open(source)
        if self.do_convert_rgb:
            image = _to_rgb(image)
        elif image.mode != "RGB":
            raise ValueError(
                f"images: expected RGB, as do_convert_rgb is False, got mode {image.mode}. Set it to True."
            )
        if self.do_resize:
            image = resize(image, self.size, self.resample)
        pixels = np.array(image)
        if self.do_center_crop:
            pixels = center_crop(pixels, self.crop_size)
        # Pixels have 256 levels: what becomes of each is worked out once, not for every pixel.
        levels = self._normalized(np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1))
        out = np.empty(pixels.shape, np.float32)
        for channel in range(3):
            np.take(levels[:, channel], pixels[..., channel], out=out[..., channel], mode="clip")
        return out

    def _normalized(self, pixels: UInt8[np.ndarray, "*B 3"]) -> Float[np.ndarray, "*B 3"]:
        if self.do_rescale:  # in float64 and rounded once, else the last bit differs
            pixels = pixels.astype(np.float64) * self.rescale_factor
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            pixels = (pixels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return pixels


def resize(image: Image.Image, size: Size, resample: int = Image.Resampling.BICUBIC) -> Image.Image:
    """Resizes to a height and width, or to a shortest edge; the long edge is then truncated, not rounded."""
    size = _size(size, shortest_edge=True)
    if "shortest_edge" not in size:
        return image.resize((size["width"], size["height"]), resample=resample)
    short, (width, height) = size["shortest_edge"], image.size
    new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    return image.resize(new, resample=resample)


def center_crop(pixels: Shaped[np.ndarray, "H W C"], crop_size: Size) -> Shaped[np.ndarray, "h w C"]:
    """The middle of an image; an axis that is too short gets a border of zeros, the odd row or column at its start."""
    size = _size(crop_size)
    top, left = (pixels.shape[0] - size["height"]) // 2, (pixels.shape[1] - size["width"]) // 2
    pixels = pixels[max(top, 0) : max(top, 0) + size["height"], max(left, 0) : max(left, 0) + size["width"]]
    above, before = max(-top, 0), max(-left, 0)
    below, after = size["height"] - above - pixels.shape[0], size["width"] - before - pixels.shape[1]
    return np.pad(pixels, ((above, below), (before, after), (0, 0)))


def _open(source: ImageSource) -> Image.Image:
    """A loaded, upright picture of at most 8 bits a channel, in its own mode."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"expected a picture or its path, got the address {source}. Download it and pass the bytes.")
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise TypeError(
            f"expected a path, bytes, a PIL image or a numpy array, got {type(source).__name__}. "
            "For a tensor or a jax array pass np.asarray(x), uint8 and channels last."
        )
    image = source if isinstance(source, Image.Image) else _read(source)
    # Pillow reads 16-bit PGM in its 32-bit mode, with values up to 65535.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F", "LAB", "La"):
        raise ValueError(
            f"expected 8 or 16 bits of gray or colour, got a picture in Pillow's mode {image.mode}, which says nothing "
            "of its range or does not convert. Turn it into uint8 RGB first."
        )
    return image


def _read(source: str | Path | bytes) -> Image.Image:
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError) as error:  # Pillow raises a SyntaxError for some broken PNG
        name = f"{len(data)} bytes" if isinstance(source, bytes) else source
        raise ValueError(f"expected a picture that Pillow can read, got {name}: {error}. Is it complete?") from error
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(
            f"expected an array of uint8, 0 to 255, got {array.dtype}. For floats from 0 to 1 pass "
            "(255 * x).round().astype(np.uint8), for uint16 (x >> 8).astype(np.uint8)."
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        todo = (
            "It looks channels first: pass x.transpose(1, 2, 0)." if channels_first else "Pass one array per picture."
        )
        raise ValueError(f"expected an array [H, W] or [H, W, 1 | 3 | 4], channels last, got {array.shape}. {todo}")
    return Image.fromarray(array)


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _size(value: Any, *, shortest_edge: bool = False) -> dict[str, int]:
    """Any spelling of a size as a dict. `shortest_edge` allows that key too, and makes it the meaning of a bare int."""
    if isinstance(value, int):
        value = {"shortest_edge": value} if shortest_edge else {"height": value, "width": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    allowed = [{"height", "width"}, {"shortest_edge"}] if shortest_edge else [{"height", "width"}]
    if not isinstance(value, Mapping) or set(value) not in allowed or not all(type(n) is int for n in value.values()):
        kinds = "height and width" + (" or shortest_edge" if shortest_edge else "")
        raise ValueError(f"image size: expected an int or {kinds}, got {value!r}. Other rules are not implemented.")
    return dict(value)


def _three_floats(name: str, value: Sequence[float] | float) -> tuple[float, ...]:
    value = (value,) * 3 if isinstance(value, int | float) else tuple(value)
    if len(value) != 3:
        raise ValueError(
            f"{name}: expected one number, or three for red, green and blue, got {value}. Correct the config."
        )
    return value


def read_image_config(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint's image processor, from the file of 5.x or that of 4.x; empty where it has none."""
    own = read_json(folder / "preprocessor_config.json")
    return read_json(folder / "processor_config.json").get("image_processor", own)


_CLIP_PROCESSORS = {"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"}
_IDEFICS_PROCESSORS = {"IdeficsImageProcessor", "IdeficsImageProcessorFast", "IdeficsImageProcessorPil"}
_DECORATION = {
    "_valid_processor_keys",
    "data_format",
    "device",
    "disable_grouping",
    "input_data_format",
    "processor_class",
    "return_tensors",
}
