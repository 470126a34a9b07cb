"""The two ends of a run of training: the model that it begins with, and the trained one.

    prepared = run.prepare(config)  # of flax_vlm.training
    state = run.run(prepared, fine_tuning.load(prepared).params)
    vlm = fine_tuning.finish(prepared, state)

`flax-vlm train` is these three lines, and then `vlm.save_pretrained`.
"""

from flax_vlm import parallel
from flax_vlm.pretrained import VLM, from_pretrained
from flax_vlm.training import run
from flax_vlm.training.step import TrainState


def load(prepared: run.Prepared) -> VLM:
    """The model that a run begins with, on its mesh and as finely as it holds it."""
    # Beside adapters nothing needs to be kept more finely than it computes.
    return _load(prepared, prepared.config.dtype if prepared.config.lora else None)


def finish(prepared: run.Prepared, state: TrainState) -> VLM:
    """The trained model, on the mesh of its run: in the dtypes that it began with, adapters merged into their kernels.

    Raises:
      ValueError: for a run that was stopped before its end.
    """
    config = prepared.config
    if int(state.step) < config.steps:
        raise ValueError(f"stopped after step {int(state.step):,} of {config.steps:,}: the same run goes on")
    vlm = _load(prepared, None)
    with parallel.use(prepared.mesh, config.rules):
        vlm.params = run.trained(prepared, state, vlm.params)
    return vlm


def _load(prepared: run.Prepared, dtype: str | None) -> VLM:
    config = prepared.config
    return from_pretrained(
        config.model, dtype=dtype, mesh=prepared.mesh, rules=config.rules, scan_layers=config.scan_layers
    )
