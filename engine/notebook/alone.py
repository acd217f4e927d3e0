"""A mesh of one rank that needs no process group: for towers in a process that is somebody else's, such as a notebook.

megatron-core's layers ask their group for its size and rank alone where it holds one rank. But where torch.distributed
is not initialised they forget the group that they were given, and then miss it: `lone_mesh` mends that.
"""

from engine.parallel.device import keep_given_groups
from engine.parallel.mesh import Axis, Links, Mesh


class OneRank:
    """Stand-in for a process group of one rank; unlike a real one it can be copied with its module."""

    def size(self) -> int:
        """1."""
        return 1

    def rank(self) -> int:
        """0."""
        return 0


def lone_mesh() -> Mesh:
    """The mesh of a job of one rank; torch.distributed is neither asked nor changed."""
    keep_given_groups()
    axis = Axis(1, 0, OneRank())  # type: ignore[arg-type]
    pair = (axis.group, axis.group)
    return Mesh(
        tensor=axis,
        pipeline=axis,
        data=axis,
        world=axis,
        replica=axis,
        stage=axis,
        alone=axis,
        links=Links(pair, pair),
        control=axis,
        hosts=axis,
    )
