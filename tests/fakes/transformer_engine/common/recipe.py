"""fp8 recipes: what scales a tensor."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Format(Enum):
    """Number format of forward and backward tensors."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """Base class."""


@dataclass
class DelayedScaling(Recipe):
    """By the history of maxima."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"


@dataclass
class Float8CurrentScaling(Recipe):
    """By the maximum of the tensor at hand."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    """By the maxima of blocks."""

    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling(Recipe):
    """By the maxima of 32 numbers."""

    fp8_format: Format = Format.E4M3
