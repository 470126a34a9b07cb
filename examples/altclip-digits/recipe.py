"""A small AltCLIP on handwritten digits; `train.py` makes what it starts from, then runs it.

    flax-vlm train examples/altclip-digits/recipe.py     goes on with a run that was stopped

Hardware: a laptop.
"""

from pathlib import Path

from flax_vlm.training.config import TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.optimizer import OptimizerConfig

FOLDER = Path(__file__).parents[2] / "build" / "altclip-digits"

CONFIG = TrainConfig(
    model=str(FOLDER / "start"),
    output=str(FOLDER / "run"),
    data=DataConfig(paths=(str(FOLDER / "data.array_record"),), format="pairs", max_length=20),  # the longest has 19
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, b2=0.98, weight_decay=0.1),
    steps=4000,
    batch_size=40,
    dtype="float32",
    remat="none",
    scan_layers=False,
    log_every=100,
)
