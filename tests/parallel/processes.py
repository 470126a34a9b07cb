"""Scripts of this folder in processes of their own: with several devices, or several processes of one job."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.compiling import FAST

ROOT = Path(__file__).parent.parent.parent


def run(script: str, *arguments: Sequence[Any], timeout: float = 300) -> list[str]:
    """What the script prints when run with each of these lists of arguments, in as many processes at the same time.

    When one fails, or all take longer than `timeout` seconds, the others are killed and so is the test.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    file = ROOT / "tests" / "parallel" / script
    running = [subprocess.Popen([sys.executable, file, *map(str, each)], **options) for each in arguments]

    def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() != 0:
                for other in running:
                    other.kill()
        return process.returncode, out, err

    # All are read at once: one that waits for its pipe to empty would keep the others waiting for it.
    with ThreadPoolExecutor(len(running)) as pool:
        done = list(pool.map(finish, running))
    for code, _, err in sorted(done, key=lambda each: each[0] == -9):  # first the one that failed, then the killed
        assert code == 0, err[-4000:]
    return [out for _, out, _ in done]


def free_address() -> str:
    """A port of this machine for processes to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
