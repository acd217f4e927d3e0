"""One rank for the tests of the models: megatron-core's layers ask for process groups even when alone."""

from collections.abc import Iterator

import pytest

from engine.config import ParallelConfig
from engine.launch import job
from engine.mesh import Mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """The mesh of a single rank, inside this process."""
    with job(ParallelConfig()) as (mesh, _):
        yield mesh
