"""The house stays as it was planned (CONTRIBUTING, "Rooms"): read from the code's own imports and docstrings."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "models", "data", "tools")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MODULES = {str(path.with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in FILES}
FRAGMENT = re.compile(r"(Of|After|Before|With|Without|In|On|By|From|That|Their|Its) ")
FLOOR = 12
"""Files in one folder: what can be taken in at a glance."""
GROUND = {"data": 0, "models": 0, "engine": 1, "tools": 2}
"""A room imports from lower ones only; those of one height know nothing of each other."""
KNOW_MEGATRON = ("models/blocks/", "engine/parallel/replicas.py", "engine/parallel/device.py")
"""Blocks, gradient buckets, and what a device needs to be ready for both: what megatron-core may change lies there."""


def imported(source: str) -> Iterator[str]:
    """Names that a module needs to be imported: those under TYPE_CHECKING and inside functions come later or never."""
    for node in _at_import(ast.parse(source).body):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif node.module is not None:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Try) or (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)):
            yield from _at_import(node.body)


def everything_imported(source: str) -> set[str]:
    """Packages that a module imports anywhere, inside functions, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {
                given.value
                for given in node.args[:1]
                if isinstance(given, ast.Constant) and isinstance(given.value, str)
            }
    return {name.split(".")[0] for name in names}


def modules_of(source: str) -> set[str]:
    """The project's own modules among them."""
    names = imported(source)
    return {found for name in names for found in (name, name.rpartition(".")[0]) if found in MODULES}


@cache
def arrows() -> dict[str, set[str]]:
    """Module -> modules of the project that it needs to be imported."""
    return {module: modules_of((ROOT / path).read_text()) - {module} for module, path in MODULES.items()}


def circle(needs: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a loop; empty if there is none."""
    left = dict(needs)
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(arrows()) == []


def test_arrows_point_down() -> None:
    up = [
        (module, target)
        for module, targets in arrows().items()
        for target in targets
        if (room := module.split(".")[0]) != (below := target.split(".")[0]) and GROUND[room] <= GROUND[below]
    ]
    assert up == []


def test_no_floor_is_a_hall() -> None:
    sizes: dict[str, int] = {}
    for path in FILES:
        sizes[str(path.parent)] = sizes.get(str(path.parent), 0) + (path.name != "__init__.py")
    assert {folder: size for folder, size in sizes.items() if size > FLOOR} == {}


def test_nobody_outside_objectives_asks_for_the_name_of_one() -> None:
    asks = re.compile(r"objective\s*(==|!=)|objective (not )?in \(")
    assert [
        str(path)
        for path in FILES
        if not str(path).startswith("engine/objectives/") and asks.search((ROOT / path).read_text())
    ] == []


def test_megatron_is_imported_where_it_is_wrapped() -> None:
    users = {str(path) for path in FILES if "megatron" in everything_imported((ROOT / path).read_text())}
    assert {room for room in KNOW_MEGATRON for user in users if user.startswith(room)} == set(KNOW_MEGATRON)
    assert [path for path in sorted(users) if not path.startswith(KNOW_MEGATRON)] == []


def test_an_import_inside_a_function_is_seen() -> None:
    inside = "def f():\n    from megatron.core import parallel_state\n"
    assert everything_imported(inside) == {"megatron"} and list(imported(inside)) == []
    assert everything_imported('importlib.import_module("megatron.core")') == {"megatron"}


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_can_be_read_alone(room: str) -> None:
    fragments = [
        f"{path}:{node.lineno}: {text.splitlines()[0]}"
        for path in FILES
        if path.parts[0] == room
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(text := node.value.value, str)
        if FRAGMENT.match(text)
    ]
    assert fragments == []
