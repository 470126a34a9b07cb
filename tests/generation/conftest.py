"""What several tests of generation watch."""

import logging
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """A function: how often something was compiled since it was last called."""

    def count() -> int:
        found = sum(record.message.startswith("compiling ") for record in caplog.records)
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO, logger="flax_vlm"):
        yield count
