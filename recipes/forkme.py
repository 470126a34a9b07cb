"""Copy this file, change what is yours, and train.

    flax-vlm train recipes/forkme.py --data.paths 'talks/*.jsonl' --output runs/talks

Low-rank adapters teach IDEFICS to talk about your pictures, on one GPU or TPU chip: its nine billion weights stay as
they are, 18 GB in bfloat16, so there should be 32 GB or more. A line of talks.jsonl is a conversation:

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "dog.jpg"},
                                               {"type": "text", "text": "Who is this?"}]},
                  {"role": "assistant", "content": "Bruno."}]}

Any field can be said on the command line, --help lists them all. The same command goes on with a run that was stopped
or killed. At the end

    flax-vlm export runs/talks/model runs/talks/torch

writes it for transformers. Several devices: --mesh.fsdp 8. Before renting any:

    flax-vlm plan idefics-9b --topology v5e:8x8 --fsdp 64 --batch 64 --seq 1024
"""

from flax_vlm.training.config import TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.lora import LoraConfig
from flax_vlm.training.optimizer import OptimizerConfig

CONFIG = TrainConfig(
    model="HuggingFaceM4/idefics-9b-instruct",
    output="runs/talks",
    data=DataConfig(paths=("talks/*.jsonl",), format="conversations", max_length=512, max_images=2),
    lora=LoraConfig(rank=16, targets="model/.*/(q|k|v|o)_proj/kernel"),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=50, b2=0.99),
    steps=1000,
    batch_size=16,
    accumulate=4,
    checkpoint_every=200,
    sample_every=200,
)
