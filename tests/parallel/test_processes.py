"""Two processes of four devices each compute what one of eight does."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from flax_vlm import checkpoint
from tests.convert.test_port import write_hf
from tests.parallel.processes import free_address, run
from tests.tolerances import FLOAT64, FLOAT64_GRADIENT, assert_close


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", np.float64)
    alone = last_line(run("steps_of_a_process.py", [tmp_path / "hf", tmp_path / "alone", 1, 0, "-"])[0])
    assert alone["shares"] == [[0, 1], [0, 1], [0, 1]] and np.ptp(alone["losses"]) > 1e-3
    address = free_address()
    folders = [tmp_path / "hf", tmp_path / "together"]
    together = run("steps_of_a_process.py", *([*folders, 2, process, address] for process in range(2)))
    for process, result in enumerate(map(last_line, together)):
        # They read rows of their own, but the same ones where `tensor` runs across both.
        assert result["shares"] == [[process, 2], [process, 2], [0, 1]]
        assert_close(result["losses"], alone["losses"], FLOAT64)
    one, both = (checkpoint.open_params(tmp_path / name) for name in ("alone", "together"))
    assert one.tensors.keys() == both.tensors.keys()
    for path in one.tensors:
        assert_close(both.read(path), one.read(path), FLOAT64_GRADIENT, path)
    assert not list(tmp_path.glob(".*"))


def last_line(printed: str) -> Any:
    """Behind what XLA's collectives have to say."""
    return json.loads(printed.splitlines()[-1])
