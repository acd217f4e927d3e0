"""One rank for the tests of the models: megatron-core's layers ask for process groups even when alone."""

from collections.abc import Iterator

import pytest

from engine.config.read import ParallelConfig
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """The mesh of a single rank, inside this process."""
    with job(ParallelConfig()) as (mesh, _):
        yield mesh
