"""Pictures of every kind, and pixel values equal to transformers' CLIP image processor bit for bit."""

import io

import numpy as np
import pytest
from PIL import Image

from flax_vlm.processing.images import ImageProcessor, load_image

RNG = np.random.default_rng(0)
SIZES = [(1, 1), (1, 300), (300, 1), (2, 3), (7, 500), (223, 224), (224, 224), (225, 224), (333, 127), (640, 427)]
CONFIGS = [
    {},
    {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3},
    {"size": {"height": 37, "width": 91}, "crop_size": {"height": 50, "width": 61}},
    {"size": [64, 33], "do_center_crop": False, "resample": 2},
    {"size": 18, "crop_size": 37, "image_mean": 0.5, "image_std": [0.5, 0.25, 1.0]},
    {"size": 18, "default_to_square": True, "crop_size": 17},
    {"do_resize": False, "crop_size": {"height": 225, "width": 128}},
    {"do_normalize": False, "rescale_factor": 1 / 127.5},
    {"do_rescale": False, "crop_size": 31},
    {"do_rescale": False, "do_normalize": False, "resample": 0},
]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(RNG.integers(0, 256, (height, width, *channels), dtype=np.uint8), mode)


def real_pictures() -> list[Image.Image]:
    data = pytest.importorskip("skimage.data")
    return [Image.fromarray(image) for image in (data.astronaut(), data.coffee(), data.chelsea(), data.camera())]


def reference(config: dict, images: list[Image.Image]) -> np.ndarray:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    pixels = module.CLIPImageProcessorPil(**config)(images)["pixel_values"]
    return np.stack([np.asarray(image) for image in pixels]).transpose(0, 2, 3, 1)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.torch
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_the_reference_on_odd_sizes(config):
    processor = ImageProcessor.from_hf(config)
    for size in SIZES:
        image = picture(*size)
        np.testing.assert_array_equal(processor(image), reference(config, [image]), err_msg=str(size), strict=False)


@pytest.mark.torch
@pytest.mark.parametrize("config", CONFIGS[:2], ids=str)
def test_equals_the_reference_on_real_pictures(config):
    images = real_pictures()
    ours = ImageProcessor.from_hf(config)(images)
    assert ours.shape == (4, 224, 224, 3) and ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference(config, images))


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK"])
def test_equals_the_reference_in_other_modes(mode):
    image = picture(50, 40, mode)
    np.testing.assert_array_equal(ImageProcessor()(image), reference({}, [image]))
    if mode != "CMYK":
        np.testing.assert_array_equal(ImageProcessor()(np.asarray(image.convert("RGBA"))), ImageProcessor()(image))


@pytest.mark.torch
def test_palette_with_and_without_transparency_equals_the_reference():
    palette = picture(40, 30).quantize(16)
    transparent = Image.open(io.BytesIO(encoded(palette, transparency=3)))
    assert transparent.mode == "P" and "transparency" in transparent.info
    assert (np.asarray(load_image(transparent))[np.asarray(palette) == 3] == 255).all()
    for image in (palette, transparent):
        np.testing.assert_array_equal(ImageProcessor()(image), reference({}, [image]))


def test_every_source_gives_the_same_pixels(tmp_path):
    image = picture(30, 20)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), image, np.asarray(image)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))
    batch = np.stack([np.asarray(image)] * 2)
    np.testing.assert_array_equal(ImageProcessor()(batch), ImageProcessor()([image, path]))
    gray = picture(30, 20, "L")
    np.testing.assert_array_equal(np.asarray(load_image(np.asarray(gray)[..., None])), np.asarray(gray.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner = Image.new("RGB", (16, 8))
    corner.paste((255, 255, 255), (0, 0, 8, 4))
    upright = np.asarray(load_image(encoded(corner, exif=exif)))[..., 0]
    assert upright.shape == ((8, 16) if orientation <= 4 else (16, 8))
    rows, columns = np.nonzero(upright)
    bottom, right = rows.min() > 0, columns.min() > 0
    assert (bottom, right) == [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)][orientation - 1]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(kind):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), kind))
    assert np.asarray(loaded)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 9), np.uint8), "channels first: pass x.transpose"),
        (np.zeros((8, 9, 2), np.uint8), r"got \(8, 9, 2\)"),
        (np.zeros((8, 9, 3), np.float32), "got float32. For floats from 0 to 1"),
        (np.zeros((8, 9), np.uint16), "uint16"),
        (b"not a picture", "got 13 bytes"),
        (encoded(picture(60, 60))[:2000], "Is it complete"),
        ("https://example.org/cat.png", "Download it"),
        (Image.new("F", (4, 4)), "mode F"),
    ],
)
def test_refusals_say_what_to_do(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_refusals_of_the_processor(tmp_path):
    with pytest.raises(TypeError, match="got list"):
        ImageProcessor()([[picture(4, 4)]])
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="empty list"):
        ImageProcessor()([])
    with pytest.raises(ValueError, match="equal sizes"):
        ImageProcessor(do_center_crop=False)([picture(30, 20), picture(20, 20)])
    with pytest.raises(ValueError, match="do_convert_rgb is False"):
        ImageProcessor(do_convert_rgb=False)(picture(4, 4, "L"))


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"longest_edge": 224}},
        {"size": "big"},
        {"crop_size": {"shortest_edge": 3}},
        {"resample": 17},
        {"image_mean": [0.5, 0.5]},
        {"do_pad": True},
        {"image_processor_type": "SiglipImageProcessor"},
    ],
    ids=str,
)
def test_unknown_values_are_refused(config):
    with pytest.raises(ValueError, match=r"expected|valid"):
        ImageProcessor.from_hf(config)


@pytest.mark.torch
def test_configs_round_trip():
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = module.CLIPImageProcessorPil(size=18, crop_size={"height": 20, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    ours = ImageProcessor.from_hf({"processor_class": "AltCLIPProcessor", "image_processor": theirs.to_dict()})
    assert ours == ImageProcessor.from_hf(ours.to_hf())
    assert module.CLIPImageProcessorPil(**ours.to_hf()).to_dict() == theirs.to_dict()
