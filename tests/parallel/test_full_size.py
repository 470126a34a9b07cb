"""idefics-9b, 18 GB, onto eight devices: a process reads its share of the checkpoint, and holds no more."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import pytest

from benchmarks.conversion import names
from benchmarks.conversion.synthetic import make_checkpoint
from flax_vlm.convert.torch_files import TorchFiles
from tests.parallel.reads_of_a_process import read_what_is_held

ROOT = Path(__file__).parent.parent.parent
PROCESSES = 8
BESIDE = 400 << 20  # bytes: slices on their way to the device, of four threads, and what the code itself takes
# The seven others of the mesh: they only have to be there, and JAX has each wait for all at its end.
OTHER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
jax.devices()
"""


@pytest.mark.slow
def test_one_of_eight_reads_and_holds_its_share(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", names.read("idefics-9b"), sparse=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with ExitStack() as others:
        for process in range(PROCESSES - 1):
            command = [sys.executable, "-c", OTHER, address, str(PROCESSES), str(process)]
            running = others.enter_context(subprocess.Popen(command, env=environment))
            others.callback(running.kill)
        last = [sys.executable, __file__, tmp_path / "hf", address]
        done = subprocess.run(last, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)


def peak() -> int:
    """The most bytes that this process had in memory so far, by the kernel's own record."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def slices_partition(leaf: jax.Array) -> int:
    """In how many slices the eight hold an array: all of it, and none of it twice unless every one holds it."""
    boxes = set()
    for index in leaf.sharding.devices_indices_map(leaf.shape).values():
        boxes.add(tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)))
    axes = [axis for axis in range(leaf.ndim) if len({box[axis] for box in boxes}) > 1]
    assert len(axes) <= 1, f"{leaf.sharding}: one axis of the mesh splits one axis of the array"
    for axis, size in enumerate(leaf.shape):
        ranges = sorted({box[axis] for box in boxes})
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), size], leaf.sharding
    return len(boxes)


def main(folder: Path, address: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(address, PROCESSES, PROCESSES - 1)
    start = peak()
    began = time.monotonic()
    read, params = read_what_is_held(folder, TorchFiles, {"data": 1, "fsdp": PROCESSES})
    seconds, grown = time.monotonic() - began, peak() - start
    counts = {path: slices_partition(leaf) for path, leaf in params.items()}
    assert set(counts.values()) == {1, PROCESSES}
    whole = sum(leaf.nbytes for leaf in params.values())
    replicated = sum(leaf.nbytes for path, leaf in params.items() if counts[path] == 1)
    assert whole == names.read("idefics-9b").nbytes and replicated < whole / 1000
    assert read == replicated + (whole - replicated) // PROCESSES
    assert grown < read + BESIDE, f"{grown:,} bytes to hold {read:,}"
    print(f"{read:,} of {whole:,} bytes in {seconds:.0f} s, {replicated:,} of them replicated, peak {grown:,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
