"""AltCLIP at its real size, through files: 864 million parameters that transformers made and saved, read by ours."""

import json
from pathlib import Path

import numpy as np
import pytest

import flax_vlm
from flax_vlm.models.altclip import AltCLIPConfig
from tests.parity import altclip_cases as cases
from tests.tolerances import FLOAT32, assert_close

DATA = Path(__file__).parent.parent / "data"


@pytest.mark.slow
@pytest.mark.torch
def test_full_size_checkpoint_of_transformers(tmp_path: Path) -> None:
    import torch

    config = AltCLIPConfig.from_hf(json.loads((DATA / "AltCLIP-config.json").read_text()))
    theirs = cases.untouched_torch_model(config, "AltCLIPModel")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="1GB")
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.zeros((2, 1), int), rng.integers(3, 250_002, (2, 75)), np.full((2, 1), 2)], axis=1)
    ids[1, 40:] = 1  # padding
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 1).astype(int),
        "pixel_values": rng.standard_normal((2, 224, 224, 3)).astype(np.float32),
    }
    with torch.inference_mode():
        expected = theirs(**cases.to_torch(inputs, "float32"))
    del theirs

    ours = flax_vlm.from_pretrained(tmp_path / "hf")(**inputs)
    for name in ("text_embeds", "image_embeds"):
        assert_close(getattr(ours, name), getattr(expected, name), FLOAT32, name)
    for tower in ("text_model_output", "vision_model_output"):
        states = [getattr(output, tower).last_hidden_state for output in (ours, expected)]
        assert_close(*states, FLOAT32, tower)
