"""Meshes, the rules that place parameters on them, and the placing."""

from flax_vlm.parallel.placing import place
from flax_vlm.parallel.sharding import FSDP, REPLICATED, Rules, make_mesh, shardings

__all__ = ["FSDP", "REPLICATED", "Rules", "make_mesh", "place", "shardings"]
