"""Everything that knows there is more than one rank; `load_model` gives a trained model to a notebook, which does not.

The import names `data`, `models` and `tools` are fixed by the project's layout and short enough to be taken by another
installed package; training with somebody else's `data` must stop before anything is imported from it.

The errors of this file carry the package's own name, which `python -m engine.train` prints as one line.
"""

from __future__ import annotations  # a Python below the range is to get as far as its line (models/versions.py)

import functools
import importlib.util
import logging
import os
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.notebook.load import load_model as load_model

_ROOT = Path(__file__).resolve().parent.parent
_PATIENCE_S = 30.0
"""How long the other ranks leave the word to the first one, whose end torchrun ends them for."""


def _end(line: str) -> None:
    """Raise the ImportError with this line: the first rank at once, the others where that ends nobody (their host alone
    has another torch).
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PATIENCE_S)
    raise ImportError(line, name=__name__)


def _refuse_shadowed_rooms() -> None:
    for room in ("data", "models", "tools"):
        spec = importlib.util.find_spec(room)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != _ROOT:
            where = spec.origin or list(spec.submodule_search_locations or []) if spec else "nowhere"
            checkout = (_ROOT / "setup.cfg").is_file()
            outside = "set PYTHONSAFEPATH=1, which leaves out the folder you stand in"
            cure = f"start from {_ROOT}" if checkout else outside
            _end(
                f"`import {room}` finds {where} instead of {_ROOT / room}: another package or folder of that name "
                f"shadows eva-megatron's; {cure}, or uninstall or rename the other one"
            )


_refuse_shadowed_rooms()


def _refuse_other_versions() -> None:
    """Refuse them, and what is not there, before torch and megatron-core are imported, where the error is worse."""
    from models.versions import missing, required

    versions = required()
    for supported, found in versions:
        if refusal := supported.refusal(found):
            _end(refusal)
    if absent := missing(_ROOT):
        _end(absent)
    for supported, found in versions:
        if (warning := supported.warning(found)) and os.environ.get("RANK", "0") == "0":
            print(f"warning: {warning}", file=sys.stderr, flush=True)


_refuse_other_versions()


def _quiet_third_parties() -> None:
    """Silence what a user can do nothing about; before megatron-core is imported, since it warns on import."""
    # Every rank would be told that Transformer Engine and Apex are absent; model.backend says what is used.
    warnings.filterwarnings("ignore", module="megatron.*")
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    # all_gather_single and reduce_scatter_single do not exist in every torch of our range.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # megatron-core 0.17 and later import it, and a CUDA build of torch then says that there is no CUDA.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


_quiet_third_parties()


class _Unused(types.ModuleType):
    """A module of functions that nobody calls."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _do_without_triton() -> None:
    """megatron-core 0.18 and 0.19 import Triton for one MoE module; torch's CPU builds come without it."""
    name = "megatron.core.transformer.moe.paged_stash"
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(name, _Unused(name))


_do_without_triton()


def compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function, from its first call on."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


def _compile_when_called() -> None:
    """megatron-core decorates some functions with torch.compile, which imports the compiler: 4 of 9 CPU seconds a rank.

    No configuration of ours calls one of them, and what calls one still gets it compiled. This module stands in for
    megatron.core.jit of 0.16 to 0.19, which is the same file in all of them.
    """
    jit: Any = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = compiled_when_called
    jit.noop_decorator = jit.enable_jit_fuser = jit.disable_jit_fuser = lambda *function: (
        function[0] if function else None
    )
    sys.modules.setdefault(jit.__name__, jit)


_compile_when_called()


def __getattr__(name: str) -> Any:
    if name == "load_model":  # torch and megatron-core are imported for those who ask for it
        from engine.notebook.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
