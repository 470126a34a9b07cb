"""Meshes, the rules that split parameters, activations and batches over them, and the placing."""

from flax_vlm.parallel.batches import batch_sharding, global_batch, process_share
from flax_vlm.parallel.meshes import make_mesh, start_processes
from flax_vlm.parallel.placing import place
from flax_vlm.parallel.rules import FSDP, FSDP_TENSOR, PRESETS, REPLICATED, Rules, find_rules, shardings, use

__all__ = [
    "FSDP",
    "FSDP_TENSOR",
    "PRESETS",
    "REPLICATED",
    "Rules",
    "batch_sharding",
    "find_rules",
    "global_batch",
    "make_mesh",
    "place",
    "process_share",
    "shardings",
    "start_processes",
    "use",
]
