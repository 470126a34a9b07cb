"""What the tests of the examples need."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def silent_transformers(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """transformers, which must neither log nor warn of anything."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.enable_propagation()
    try:
        yield
    finally:
        transformers.logging.disable_propagation()
    assert not caplog.messages
    assert not recwarn.list
