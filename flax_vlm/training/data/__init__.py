"""From files of records to the batches of a step."""

from flax_vlm.training.data.batches import Batches, DataConfig, make_batches

__all__ = ["Batches", "DataConfig", "make_batches"]
