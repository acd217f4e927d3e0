"""Stand-in for Transformer Engine 2.20.2 (tests/fakes/README.md)."""

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch

__version__ = "2.20.2"
