"""Every collective names its process group: the default group would silently span the whole job."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLLECTIVES = {
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "P2POp",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
}


MEGATRON = re.compile(r"(copy|reduce|gather|scatter|reduce_scatter|all_to_all)_\w*_region|all_to_all\w*")
"""megatron-core's differentiable collectives, which fall back to its global groups."""


def calls_without_group(source: str) -> list[int]:
    """Lines of collective calls that do not say their group, or say the default one."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed"
        for alias in node.names
        if alias.name in COLLECTIVES
    }
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and _lacks_group(node, imported)]


def _lacks_group(call: ast.Call, imported: set[str]) -> bool:
    match call.func:
        case (
            ast.Attribute(value=ast.Name(id="dist"), attr=name)
            | ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="distributed"), attr=name)
        ):
            is_collective = name in COLLECTIVES
        case ast.Name(id=name):
            is_collective = name in imported or bool(MEGATRON.fullmatch(name))
        case _:
            is_collective = False
    group = next((keyword.value for keyword in call.keywords if keyword.arg == "group"), None)
    if group is None and isinstance(call.func, ast.Attribute) and call.func.attr == "P2POp":
        group = next(iter(call.args[3:]), None)  # its customary place
    return is_collective and (group is None or (isinstance(group, ast.Constant) and group.value is None))


@pytest.mark.parametrize(
    "call",
    [
        "dist.all_reduce(x)",
        "dist.all_reduce(x, group=None)",
        "dist.barrier()",
        "dist.P2POp(dist.isend, x, 1)",
        "torch.distributed.broadcast(x, src=0)",
        "reduce_from_tensor_model_parallel_region(x)",
        "from torch.distributed import all_gather as everyone, broadcast; broadcast(x, 0)",
    ],
)
def test_the_check_sees_a_missing_group(call: str) -> None:
    assert calls_without_group(call) == [1]


@pytest.mark.parametrize(
    "call",
    ["dist.all_reduce(x, group=g)", "gather_from_tensor_model_parallel_region(x, group=g)", "torch.gather(x, 0, i)"],
)
def test_the_check_leaves_good_calls_alone(call: str) -> None:
    assert calls_without_group(call) == []


def test_every_collective_names_its_group() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for room in ("engine", "models", "data", "tools")
        for path in (ROOT / room).rglob("*.py")
        for line in calls_without_group(path.read_text())
    }
    assert not found
