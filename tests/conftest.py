"""The whole suite runs on several cores at once; what it has imported is left out of collections of garbage."""

import gc
import os
import sys

import pytest

# Workers, ranks and commands import the same files several hundred times: they are compiled once, even where the
# environment asks for no __pycache__, as images of containers do.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

MOST_WORKERS = 4
"""More would outdo the memory of a common machine: each has its own server of ranks, and starts up to eight of them."""
SLOW_LIMIT_S = 3600
LONG = {"run_distributed", "dry_run", "pytestmark"}
"""Names of which a module of tests that takes long has one: it starts ranks, or runs dry."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Start a worker a core where all tests are asked for, or as many as TEST_WORKERS says, if pytest-xdist is here.

    A file stays with one worker, because its tests share launches of ranks. Some tests asked for by name start sooner
    without workers, each of which imports everything once more. What -n says is left as it is.
    """
    options, wanted = config.option, os.environ.get("TEST_WORKERS", "")
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if options.numprocesses is not None or options.dist != "no":
        return
    if options.usepdb or options.collectonly or not (wanted or config.args == config.getini("testpaths")):
        return
    options.numprocesses = int(wanted or min(len(os.sched_getaffinity(0)), MOST_WORKERS))
    options.dist = "loadfile"
    options.loadscopereorder = False  # in the order of pytest_collection_modifyitems, not by the number of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave slow tests an hour where pyproject.toml's limit is minutes; long files come first.

    A long file that begins last leaves the other workers without work.
    """
    items.sort(key=lambda item: not _is_long(item))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT_S))


def _is_long(item: pytest.Item) -> bool:
    return not LONG.isdisjoint(vars(getattr(item, "module", None) or object))


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every later collection of garbage: 0.4 s each."""
    gc.collect()
    gc.freeze()
