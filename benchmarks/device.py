"""Where contestants work: on the CPU, or with `--device gpu` on an NVIDIA GPU.

JAX is told by JAX_PLATFORMS; torch's contestants ask here. On a GPU a run is over when the device is done, memory is
the device's, and `torch.compile` records CUDA graphs.
"""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from benchmarks.cases import Work

Device = Literal["cpu", "gpu"]
VARIABLE = "FLAX_VLM_BENCHMARK_DEVICE"  # what a contestant's process is told
# JAX may take TF32 for float32 unless told, which torch does not, and most of the memory, which torch needs too.
ENVIRONMENTS: Mapping[Device, Mapping[str, str]] = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "gpu": {
        "JAX_PLATFORMS": "cuda",
        "JAX_DEFAULT_MATMUL_PRECISION": "float32",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        VARIABLE: "gpu",
    },
}


def gpu_name() -> str:
    """As its driver calls it.

    Raises:
      ValueError: where there is none.
    """
    if shutil.which("nvidia-smi") is None:
        raise ValueError("--device gpu: expected an NVIDIA GPU and its nvidia-smi, there is none")
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ValueError(f"--device gpu: nvidia-smi says {(asked.stdout or asked.stderr).strip()}")
    return asked.stdout.splitlines()[0]


def of_torch() -> str:
    """For `.to()`."""
    return "cuda" if _on_gpu() else "cpu"


def compile_torch(model: Any) -> Any:
    """`torch.compile` at its fastest."""
    import torch

    return torch.compile(model, mode="reduce-overhead" if _on_gpu() else None)


def torch_work(run: Callable[[], Any], states: Callable[[Any], Any] = lambda output: output) -> Work:
    """Work of torch; `states` are those of its output to compare."""

    def run_to_the_end() -> Any:
        output = run()
        if _on_gpu():
            import torch

            torch.cuda.synchronize()
        return output

    def as_numpy(output: Any) -> np.ndarray:
        return states(output).detach().float().cpu().numpy()

    return Work(run_to_the_end, as_numpy)


def peak_bytes() -> int:
    """Of this process; on a GPU, of the device."""
    if not _on_gpu():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    if "jax" in sys.modules:
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    import torch

    return torch.cuda.max_memory_allocated()


def _on_gpu() -> bool:
    return os.environ.get(VARIABLE) == "gpu"
