"""AltCLIP on pictures with captions, all of it, with its own loss over the whole global batch.

    flax-vlm train recipes/altclip.py --data.paths 'pairs/*.array_record'

Hardware: a TPU v5e-256 (16x16); `flax-vlm plan altclip --topology v5e:16x16 --batch 32768 --seq 77` says what it needs
of each chip. On one GPU: --batch-size 512 --contrastive-chunk 0. Webdataset tars become one file of records by
`flax-vlm records cc12m/*.tar pairs/cc12m.array_record`.
"""

from flax_vlm.training.config import TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.optimizer import OptimizerConfig

CONFIG = TrainConfig(
    model="BAAI/AltCLIP",
    output="runs/altclip",
    data=DataConfig(paths=("pairs/*.array_record",), format="pairs", max_length=77, workers=8),
    optimizer=OptimizerConfig(
        learning_rate=2e-5,
        warmup_steps=500,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.05,
        decay=(("logit_scale", False),),
    ),
    steps=10_000,
    batch_size=32_768,
    contrastive_chunk=2048,
    ema_decay=0.999,
    spike_factor=10.0,
    distributed=True,
)
