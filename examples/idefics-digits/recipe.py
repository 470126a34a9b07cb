"""A small IDEFICS on questions about handwritten digits; `train.py` makes what it starts from, then runs it.

    flax-vlm train examples/idefics-digits/recipe.py     goes on with a run that was stopped

The image tower stays as it is, by the model's config.json. Hardware: a laptop.
"""

from pathlib import Path

from flax_vlm.training.config import TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.optimizer import OptimizerConfig

FOLDER = Path(__file__).parents[2] / "build" / "idefics-digits"

CONFIG = TrainConfig(
    model=str(FOLDER / "start"),
    output=str(FOLDER / "run"),
    data=DataConfig(
        paths=(str(FOLDER / "data.array_record"),),
        format="questions",
        max_length=32,  # the longest have 31
        max_images=3,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=40, b2=0.98, weight_decay=0.1),
    steps=800,
    batch_size=32,
    dtype="float32",
    remat="none",
    scan_layers=False,
    log_every=100,
)
