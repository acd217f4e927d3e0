"""The whole suite runs on several cores at once; what it has imported is left out of collections of garbage."""

import gc
import os

import pytest

MOST_WORKERS = 4
"""More would outdo the memory of a common machine: each has its own server of ranks, and starts up to eight of them."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Start a worker a core where all tests were asked for, no number (-n) was, and pytest-xdist is installed.

    A file stays with one worker, because its tests share launches of ranks. Some tests asked for by name start sooner
    without workers, each of which imports everything once more.
    """
    options = config.option
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or not config.pluginmanager.hasplugin("xdist"):
        return
    if options.numprocesses is None and options.dist == "no" and not (options.usepdb or options.collectonly):
        options.numprocesses = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        options.dist = "loadfile"


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every later collection of garbage: 0.4 s each."""
    gc.collect()
    gc.freeze()
