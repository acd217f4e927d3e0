"""Groups of a mesh that is one rank."""

from engine.config.read import ParallelConfig
from engine.parallel.launch import job


def test_the_axes_of_one_rank_share_a_group() -> None:
    with job(ParallelConfig()) as (mesh, _):
        axes = (mesh.tensor, mesh.data, mesh.pipeline, mesh.replica, mesh.stage, mesh.control)
        assert all(axis.group is mesh.alone.group for axis in axes)
        assert mesh.world.group is not mesh.alone.group
