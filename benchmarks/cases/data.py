"""Reading 1,024 pictures with their texts from JPEG files to batches of arrays, in two worker processes.

The pictures are 256 crops of 640 x 480 of the photographs that scikit-learn brings; both contestants make 224 x 224 of
them as CLIP does, and ids of their texts. What starts the workers is the first run's.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case, Work

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "altclip-digits" / "checkpoint"
FILES, WIDTH, HEIGHT = 256, 640, 480
BATCH, WORKERS, TOKENS = 32, 2, 20


def cases(quick: bool) -> list[Case]:
    number = 2 * BATCH if quick else 1024
    contestants = {"flax_vlm": partial(ours, number), "torch DataLoader, transformers": partial(theirs, number)}
    return [Case(f"data: JPEG files of {WIDTH} x {HEIGHT} with texts, 1,024 of them, 2 workers", contestants)]


def ours(number: int) -> Work:
    """Pairs of AltCLIP, from a file of JSON lines."""
    from flax_vlm.processing import AltCLIPProcessor, ImageProcessor, Tokenizer
    from flax_vlm.training.data import DataConfig, make_batches

    processor = AltCLIPProcessor(ImageProcessor(), Tokenizer.from_dir(TOKENIZER))
    config = DataConfig((str(records()),), "pairs", max_length=TOKENS, workers=WORKERS)
    batches = make_batches(config, processor, "altclip", batch_size=BATCH, seed=0)

    def run() -> np.ndarray:
        for _ in range(number // BATCH):
            batch = next(batches)
        return batch["pixel_values"]

    return Work(run=run, as_numpy=np.asarray)


def theirs(number: int) -> Work:
    """The same files, as a map-style dataset whose items the processor of transformers makes."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from transformers import AltCLIPProcessor, AutoTokenizer, CLIPImageProcessorPil

    processor: Any = AltCLIPProcessor(CLIPImageProcessorPil(), AutoTokenizer.from_pretrained(TOKENIZER))
    file = records()
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]

    class Pairs(Dataset):
        def __len__(self) -> int:
            return number

        def __getitem__(self, index: int) -> dict[str, Any]:
            line = lines[index % len(lines)]
            with Image.open(file.parent / line["image"]) as image:
                inputs = processor(
                    images=image.convert("RGB"),
                    text=line["text"],
                    padding="max_length",
                    truncation=True,
                    max_length=TOKENS,
                    return_tensors="pt",
                )
            return {name: array[0] for name, array in inputs.items()}

    loader = DataLoader(Pairs(), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)

    def run() -> Any:
        for batch in loader:
            pixels = batch["pixel_values"]
        return pixels

    return Work(run=run, as_numpy=lambda pixels: pixels.numpy().transpose(0, 2, 3, 1))


def records() -> Path:
    """The pictures and their texts; made once, and the same ones again."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = ROOT / "build" / "benchmarks" / "pictures"
    file = folder / "pairs.jsonl"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [Image.fromarray(each).resize((960, 640)) for each in load_sample_images().images]
    rng = np.random.default_rng(0)
    lines = []
    for index in range(FILES):
        left, top = int(rng.integers(960 - WIDTH)), int(rng.integers(640 - HEIGHT))
        crop = photographs[index % 2].crop((left, top, left + WIDTH, top + HEIGHT))
        crop.save(folder / f"{index}.jpg", quality=90)
        lines.append(json.dumps({"image": f"{index}.jpg", "text": f"photograph {index}"}))
    file.write_text("\n".join(lines), "utf-8")
    return file
