"""Folders of these tests lie in memory where they can: a checkpoint syncs a dozen times, and disks of test machines are
slow and shared. What fsync is for, power loss, no test here can cause.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = "/dev/shm"


@pytest.fixture(scope="module")
def module_path() -> Iterator[Path]:
    """A folder for the tests of a module."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In place of pytest's."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)
