"""A mesh of one rank that needs no process group: for towers in a process that is somebody else's, such as a notebook.

megatron-core's layers ask their group for its size and rank alone where it holds one rank. But where torch.distributed
is not initialised they forget the group that they were given, and then miss it: `lone_mesh` mends that.
"""

from typing import Any

from megatron.core.tensor_parallel import layers, mappings

from engine.parallel.mesh import Axis, Links, Mesh

FORGETFUL = "get_tensor_model_parallel_group_if_none"
"""megatron-core's function that answers None for every group where torch.distributed is not initialised."""


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
    for module in (layers, mappings):
        _keep_given_groups(module)
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
    )


def _keep_given_groups(module: Any) -> None:
    """Let a module of megatron-core answer with the group that is given; nothing else about it changes."""
    original = getattr(module, FORGETFUL)
    if getattr(original, "keeps", False):
        return

    def group_or_default(tp_group: Any, *more: Any, **named: Any) -> Any:
        return original(tp_group, *more, **named) if tp_group is None else tp_group

    group_or_default.keeps = True  # type: ignore[attr-defined]
    setattr(module, FORGETFUL, group_or_default)
