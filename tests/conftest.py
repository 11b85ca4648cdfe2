"""Fixtures that several files of tests use."""

import logging
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState

import tiny_models as tiny


def pytest_collection_finish() -> None:
    """All files of tests have been imported by now."""
    tiny.leave_out_what_is_there()


@pytest.fixture(autouse=True)
def _level_of_the_log() -> Iterator[None]:
    """A command sets it for its process, which here is that of other tests, too."""
    logger = logging.getLogger("hf_xgrad")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let each test choose its precision anew: Accelerate keeps one for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
