"""What is wrong with a run is said before a device works, with the name of the field."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from PIL import Image

from flax_vlm import parallel
from flax_vlm.training.config import MeshConfig, RulesName, TrainConfig, check, keep_config
from flax_vlm.training.data import DataConfig
from flax_vlm.training.lora import LoraConfig
from flax_vlm.training.optimizer import OptimizerConfig
from flax_vlm.training.run import prepare

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "text": "a zero"}))
    return TrainConfig(
        model=str(EXAMPLES / "altclip-digits" / "checkpoint"),
        output=str(tmp_path / "run"),
        data=DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), format="pairs", max_length=20),
        steps=10,
        batch_size=12,
    )


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """With {"data.paths": ...} as well."""
    for name, value in changes.items():
        *outer, name = name.split(".")
        if outer:
            name, value = outer[0], dataclasses.replace(getattr(config, outer[0]), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": "gs://bucket/run"}, "output is 'gs://bucket/run': expected a folder here"),
        ({"steps": 0}, "steps is 0: expected a number above 0"),
        ({"accumulate": 5}, "batch_size is 12: expected a multiple of accumulate, which is 5"),
        ({"contrastive_chunk": 7}, "contrastive_chunk is 7: expected a divisor of 12 rows"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: expected a number between 0 and 1"),
        ({"spike_factor": 0.5}, "spike_factor is 0.5: expected a number above 1"),
        ({"profile": (3, 11)}, r"profile is \(3, 11\): expected two steps from 1 to 10"),
        ({"dtype": "float8"}, "dtype is 'float8': expected one of bfloat16, float32"),
        ({"remat": "all"}, "remat is 'all': expected one of none, full"),
        ({"rules": "zero"}, "rules is 'zero': expected one of replicated, fsdp, fsdp_tensor"),
        ({"lora": LoraConfig(), "trainable": ((".*", True),)}, "trainable is .* expected no patterns beside lora"),
        ({"keep": 0, "sample_every": -1}, "keep is 0: .*; sample_every is -1: "),
    ],
)
def test_fields_that_cannot_be(config: TrainConfig, changes: dict[str, Any], said: str) -> None:
    check(config)
    with pytest.raises(ValueError, match=said):
        check(changed(config, changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "no/such/folder"}, "model: no/such/folder: expected the folder of a checkpoint"),
        ({"data.paths": ("no.jsonl",)}, "data.paths: no.jsonl: expected a file of records"),
        ({"data.format": "documents"}, "data.format is 'documents'"),
        ({"mesh": MeshConfig(data=2)}, "mesh: a mesh of data=2, fsdp=1, tensor=1 does not fill 1 devices"),
        ({"trainable": (("visoin_model/.*", False),)}, "trainable: 'visoin_model/.*' matches none"),
        ({"optimizer": OptimizerConfig(name="adam2")}, "optimizer.name is 'adam2'"),
        ({"optimizer.learning_rates": (("nothing", 2.0),)}, "optimizer.learning_rates: 'nothing' matches none"),
        ({"lora": LoraConfig(targets="nothing")}, "lora.targets: 'nothing' matches none"),
        ({"sample_every": 2}, "sample_every is 2: expected 0, as AltCLIPModel says nothing"),
    ],
)
def test_what_does_not_fit(config: TrainConfig, changes: dict[str, Any], said: str) -> None:
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match=said):
        prepare(changed(config, changes))
    assert len(jax.live_arrays()) <= before
    assert not Path(config.output).exists()


def test_a_mesh_that_does_not_divide_the_batch(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = jax.sharding.AbstractMesh((5, 1, 1), ("data", "fsdp", "tensor"))
    monkeypatch.setattr("flax_vlm.parallel.make_mesh", lambda **_: mesh)
    monkeypatch.setattr("flax_vlm.parallel.process_share", lambda *_: (0, 1))
    with pytest.raises(ValueError, match="batch_size is 12: expected a multiple of 10, as the mesh splits it 5 ways"):
        prepare(dataclasses.replace(config, accumulate=2))


def test_the_objective_of_a_language_model(config: TrainConfig) -> None:
    wrong = {"model": str(EXAMPLES / "idefics-digits" / "checkpoint"), "objective": "sigmoid"}
    with pytest.raises(ValueError, match="objective is 'sigmoid': expected 'auto' for IdeficsForVisionText2Text"):
        prepare(changed(config, wrong))


def test_rules_are_the_presets() -> None:
    assert get_args(RulesName) == tuple(parallel.PRESETS)


def test_the_folder_of_another_run(config: TrainConfig) -> None:
    keep_config(config)
    keep_config(changed(config, {"log_every": 1, "mesh.fsdp": 8, "data.workers": 2, "keep": 9}))
    keep_config(config)
    other = changed(config, {"optimizer.learning_rate": 0.5, "steps": 20})
    with pytest.raises(ValueError, match=r"of another run: optimizer.learning_rate is 0.5, was 0.0001; steps is 20"):
        keep_config(other)
    with pytest.raises(ValueError, match=r"lora.rank is 16, was None"):
        keep_config(changed(config, {"lora": LoraConfig()}))
    (Path(config.output) / "train.json").write_text("[")
    with pytest.raises(ValueError, match=r"train.json: expected the JSON of a run's config"):
        keep_config(config)
