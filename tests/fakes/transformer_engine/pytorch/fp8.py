"""Whether linears quantise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, Recipe


class FP8GlobalStateManager:
    """State of the innermost fp8_autocast."""

    enabled = False
    recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Inside an enabled fp8_autocast."""
        return cls.enabled


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Linears called inside quantise their inputs and weights."""
    before = FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe
    FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe = enabled, fp8_recipe
    try:
        yield
    finally:
        FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe = before


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Not used: no parameter of ours is in fp8."""
    raise NotImplementedError
    yield


def quantise(x: Tensor, recipe: Recipe | None) -> Tensor:
    """Values that fp8 e4m3 holds, under one scale for the whole tensor; the gradient passes through."""
    assert not isinstance(recipe, DelayedScaling), "the engine does not offer it"
    scale = 448.0 / x.detach().abs().amax().float().clamp_min(1e-12)
    rounded = ((x.detach().float() * scale).to(torch.float8_e4m3fn).float() / scale).to(x.dtype)
    return x + (rounded - x).detach()
