"""What every test runs under: the CPU, full precision, no network, and checked shapes."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator

# One thread a process under pytest-xdist: the processes are as many as the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["FLAX_VLM_COMPILATION_CACHE"] = "off"  # of commands that tests start: they leave nothing with the user

import hypothesis
import jax
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

from tests.compiling import FAST

jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile("flax_vlm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("flax_vlm")

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_types(function):
    """beartype for everything but constructors.

    jax rebuilds a dataclass that is a pytree with leaves of any kind (shapes, shardings, None), and linen's modules
    inherit fields whose types cannot be checked (the protocol of nn.Dense.promote_dtype).
    """
    return function if function.__name__ == "__init__" else _beartype(function)


# Shapes and dtypes in the signatures of layers and models are checked in all tests; this has to come before their first
# import. What faces people (processing, conversion, command line) is left alone: tests hold its own error messages.
jaxtyping.install_import_hook(["flax_vlm.layers", "flax_vlm.models"], f"{__name__}.check_types")


@pytest.fixture
def unchecked_types():
    """No shape checks in this test: for tests of what a layer or model itself says to a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def x64():
    """float64 for this test only. For a part of a test, or a fixture of wider scope: `with jax.enable_x64(True):`."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """A function: how often something was compiled since it was last called."""

    def count() -> int:
        found = sum(record.message.startswith("compiling ") for record in caplog.records)
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO, logger="flax_vlm"):
        yield count


def pytest_configure(config):
    """Tests marked `slow` are compiled as users compile, all others fast, in this process and those that they start."""
    if config.getoption("markexpr") != "slow":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}"


def pytest_collection_modifyitems(items):
    """Tests marked `torch` are skipped, not failed, where the original cannot be run."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        skip = pytest.mark.skip(reason=f"{' and '.join(missing)} not installed")
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(skip)
