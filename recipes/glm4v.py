"""GLM-4V-9B on conversations about pictures; its image tower stays as it is.

    flax-vlm train recipes/glm4v.py --data.paths 'talks/*.array_record'

Hardware: a TPU v5e-64 (8x8); `flax-vlm plan glm-4v-9b --topology v5e:8x8 --fsdp 64 --batch 64 --seq 512` says what it
needs of each chip. A picture of 1120 x 1120 pixels takes 1,600 tokens, which do not count in max_length.
"""

from flax_vlm.training.config import MeshConfig, TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.optimizer import OptimizerConfig

CONFIG = TrainConfig(
    model="THUDM/glm-4v-9b",
    output="runs/glm4v",
    data=DataConfig(paths=("talks/*.array_record",), format="conversations", max_length=512, max_images=1, workers=8),
    trainable=(("transformer/vision/.*", False),),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=200, b2=0.95, weight_decay=0.1),
    steps=5000,
    batch_size=128,
    accumulate=2,
    mesh=MeshConfig(data=1, fsdp=64),
    distributed=True,
)
