"""A small GLM-4V on questions about pictures of four digits; `train.py` makes what it starts from, then runs it.

    flax-vlm train examples/glm4v-digits/recipe.py     goes on with a run that was stopped

Hardware: a laptop.
"""

from pathlib import Path

from flax_vlm.training.config import TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.optimizer import OptimizerConfig

FOLDER = Path(__file__).parents[2] / "build" / "glm4v-digits"
TOWER_STEPS, TOWER_BATCH = 700, 64  # of the tower alone, before; see tower.py

CONFIG = TrainConfig(
    model=str(FOLDER / "start"),
    output=str(FOLDER / "run"),
    data=DataConfig(paths=(str(FOLDER / "data.array_record"),), format="conversations", max_length=64),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, b2=0.98, weight_decay=0.1),
    steps=1800,
    batch_size=32,
    dtype="float32",
    remat="none",
    scan_layers=False,
    vocab_chunk=0,
    log_every=50,
)
