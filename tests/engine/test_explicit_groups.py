"""Every collective names its process group: the default group would silently span the whole job."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLLECTIVES = {
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
    "send",
}


def calls_without_group(source: str) -> list[int]:
    """Lines of torch.distributed calls (through the name `dist`) that do not say their group."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "dist"
        and node.func.attr in COLLECTIVES
        and not any(keyword.arg == "group" for keyword in node.keywords)
    ]


def test_the_check_sees_a_missing_group() -> None:
    assert calls_without_group("dist.all_reduce(x)\ndist.all_reduce(x, group=g)\n") == [1]


def test_every_collective_names_its_group() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for room in ("engine", "models", "data", "tools")
        for path in (ROOT / room).rglob("*.py")
        for line in calls_without_group(path.read_text())
    }
    assert not found
