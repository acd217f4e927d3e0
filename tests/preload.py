"""What the server that ranks are forked from has imported, so that no rank imports it again (tests/distributed.py).

A collection of garbage visits every object, and half a million of them come with these imports: 0.4 s each time, and
a copy of every page for each rank. Frozen, they are left alone.
"""

import gc
import sys

import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo  # noqa: F401  # what counts operators or forces eager asks for it: 1 s a rank

import engine.train
import engine.trainer  # noqa: F401

sys.dont_write_bytecode = False  # the server was told -B where the tests were; see tests/conftest.py
gc.collect()
gc.freeze()
