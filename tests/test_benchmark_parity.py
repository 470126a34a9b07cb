"""The table of parity in the README: it runs, and its differences are what tolerances.py and the noise floor allow."""

import jax
import numpy as np
import pytest

from benchmarks import parity
from tests.tolerances import FLOAT32, FLOAT64

pytestmark = pytest.mark.torch


@pytest.mark.slow
def test_one_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["AltCLIP", "IDEFICS"]) == 0
    assert not jax.config.read("jax_enable_x64")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:3] for row in cells[::2]] == [
        ["AltCLIP", "image_embeds", "float64"],
        ["AltCLIP", "image_embeds", "float32"],
        ["AltCLIP", "image_embeds", "bfloat16"],
        ["IDEFICS", "logits", "float64"],
        ["IDEFICS", "logits", "bfloat16"],
    ]
    for _, _, dtype, to_torch, to_float64, floor in cells:
        (rms, largest), (own, _), (floor_rms, _) = (
            map(float, each.split(", ")) for each in (to_torch, to_float64, floor)
        )
        assert 0 < rms < largest and 0 < own < 1.5 * floor_rms
        assert largest <= {"float64": FLOAT64, "float32": FLOAT32, "bfloat16": np.inf}[dtype]


def test_unknown_families_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parity.main(["IDEFIX"])
    assert "expected some of AltCLIP, IDEFICS, GLM-4V, came IDEFIX" in capsys.readouterr().err
