"""Functions that torch.compile turns into kernels, registered as operators of torch: `eva::name`.

Written by Triton for a GPU and in C++ for a CPU, at the first call, and once more for all later numbers of rows. As an
operator a function is one thing to whoever watches: a dry run on tensors without values takes its shapes from the same
code, and the counts of launches and bytes (benchmarks/operators.py) see what goes in and what comes out.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("eva", "FRAGMENT")
NAMESPACE = "eva"

F = TypeVar("F", bound=Callable[..., Any])


def operator(schema: str) -> Callable[[F], F]:
    """Register a function of tensors under `schema` ("name(Tensor x, …) -> Tensor"); callers get the operator.

    It must answer with new tensors, never with one that it was given.
    """
    name = schema.split("(")[0]

    def register(function: F) -> F:
        _LIBRARY.define(schema)
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, _runs_compiled(function), device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_LIBRARY)
        FUNCTIONS[name] = function
        return getattr(getattr(torch.ops, NAMESPACE), name)

    return register


FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Name of an operator -> the function as it is written."""


def _runs_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return _compiled(function, *(_kind(arg) for arg in args))(*args)

    return run


def _kind(arg: Any) -> Any:
    """What a kernel is written for: the dtype and width of a tensor, any other value itself."""
    return (arg.dtype, arg.shape[-1:]) if isinstance(arg, Tensor) else arg


@cache
def _compiled(function: Callable[..., Any], *kinds: Any) -> Callable[..., Any]:
    """A compiled copy. One for each kind: the compiler gives up on a function that it had to write too often."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_COPIES)}")
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    _COPIES.append(own)
    return torch.compile(own, fullgraph=True)


_COPIES: list[FunctionType] = []
