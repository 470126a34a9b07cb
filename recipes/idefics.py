"""IDEFICS-9B on interleaved documents, several packed into a row; its image tower stays as it is.

    flax-vlm train recipes/idefics.py --data.paths 'documents/*.array_record'

Hardware: a TPU v5e-64 (8x8); `flax-vlm plan idefics-9b --topology v5e:8x8 --fsdp 64 --batch 64 --seq 1024 --images 4`
says what it needs of each chip. To leave the language model as it is too, add to `trainable`
("model/(blocks/layers_.*|norm/.*|embed_tokens/embedding)", False).
"""

from flax_vlm.training.config import MeshConfig, TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.optimizer import OptimizerConfig

CONFIG = TrainConfig(
    model="HuggingFaceM4/idefics-9b",
    output="runs/idefics",
    data=DataConfig(
        paths=("documents/*.array_record",), format="documents", max_length=1024, max_images=4, packing=True, workers=8
    ),
    trainable=(("model/vision_model/.*", False),),
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=1000, b2=0.95, weight_decay=0.1),
    steps=20_000,
    batch_size=256,
    accumulate=4,
    spike_factor=10.0,
    mesh=MeshConfig(data=1, fsdp=64),
    distributed=True,
)
