"""Ahead of time: programs compiled for TPUs that are not here, by the compiler that is used there (extra `tpu`).

    mesh = make_mesh(fsdp=64, devices=devices("v5e:8x8"))
    program = compile_for(mesh, FSDP, jax.jit(step), state, batch)    # of shapes, with shardings on the mesh
    program.memory, program.collectives, program.seconds

Nothing is run. Whether a program fits is what the compiler says: it places all arrays in memory.
"""

import importlib.util
import os
import re
import time
from functools import cached_property
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flax_vlm.parallel import hlo
from flax_vlm.parallel.rules import Rules, use

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = re.compile(r"Used ([0-9.]+)([BKMGT]?) of ([0-9.]+)([BKMGT]?) hbm")


class DoesNotFit(ValueError):
    """A program that needs more memory than a chip has; bytes."""

    def __init__(self, used: float, available: float) -> None:
        super().__init__(f"needs {used / 2**30:.2f} GiB a chip, and there are {available / 2**30:.2f}")
        self.used = used
        self.available = available


class Memory(NamedTuple):
    """Bytes on each device: what goes in, what comes out, how much of that in the place of what went in, and what is
    needed in between (activations, gradients, gathered parameters)."""

    arguments: int
    results: int
    reused: int
    temporaries: int

    @property
    def outputs(self) -> int:
        """Results in memory of their own."""
        return self.results - self.reused

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries


class Program:
    """What the compiler made."""

    def __init__(self, compiled: Any, seconds: float) -> None:
        self.seconds = seconds  # that it took to compile
        self.text: str = compiled.as_text()
        analysis = compiled.memory_analysis()
        self.memory = Memory(
            analysis.argument_size_in_bytes,
            analysis.output_size_in_bytes,
            analysis.alias_size_in_bytes,
            analysis.temp_size_in_bytes,
        )

    @cached_property
    def collectives(self) -> list[hlo.Collective]:
        """What its devices send each other."""
        return hlo.collectives(self.text)


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Those of TPUs by name ("v5e:8x8", "v5p:4x4x4"), to compile for.

    Raises:
      ValueError: for a name that the compiler does not know, and without libtpu.
    """
    # Outside of Google's cloud: do not look for its metadata server, which takes minutes; and nothing here is in use.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs its compiler, libtpu: pip install flax-vlm[tpu] (on Linux)")
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except Exception as error:
        raise ValueError(
            f"topology {topology!r}: expected a generation and its shape, v5e:4x8 or v5p:4x4x4 say ({error})"
        ) from error


def compile_for(mesh: Mesh, rules: Rules | str, jitted: Any, *arguments: Any, quick: bool = False) -> Program:
    """Compiles a jitted function for the devices of `mesh`.

    Args:
      arguments: as shapes (`jax.ShapeDtypeStruct`) with shardings on the mesh; static ones as they are.
      quick: with the least effort, several times as fast; memory and collectives come out a little different.

    Raises:
      DoesNotFit: when a device has too little memory.
    """
    began = time.monotonic()
    platform = mesh.devices.flat[0].platform
    with use(mesh, rules):
        lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
        try:
            compiled = lowered.compile({"exec_time_optimization_effort": -1.0} if quick else None)
        except jax.errors.JaxRuntimeError as error:
            if quick and "No such compile option" in str(error):  # releases after 0.10 have none for this
                return compile_for(mesh, rules, jitted, *arguments)
            found = _TOO_LARGE.search(str(error))
            if not found:
                raise
            used, available = (float(found[i]) * _UNITS[found[i + 1] or "B"] for i in (1, 3))
            raise DoesNotFit(used, available) from error
    return Program(compiled, time.monotonic() - began)
