"""Fixtures that several files of tests use."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState

import tiny_models as tiny


def pytest_collection_finish() -> None:
    """All files of tests have been imported by now."""
    tiny.leave_out_what_is_there()


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let each test choose its precision anew: Accelerate keeps one for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
