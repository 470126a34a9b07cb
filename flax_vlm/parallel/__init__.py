"""Meshes and the rules that place parameters on them."""

from flax_vlm.parallel.sharding import FSDP, REPLICATED, Rules, make_mesh, shardings

__all__ = ["FSDP", "REPLICATED", "Rules", "make_mesh", "shardings"]
