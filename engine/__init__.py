"""Everything that knows there is more than one rank.

The import names `data`, `models` and `tools` are fixed by the project's layout and short enough to be taken by another
installed package; training with somebody else's `data` must stop before anything is imported from it.
"""

import importlib.util
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _refuse_shadowed_rooms() -> None:
    for room in ("data", "models", "tools"):
        spec = importlib.util.find_spec(room)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != _ROOT:
            where = spec.origin or list(spec.submodule_search_locations or []) if spec else "nowhere"
            raise ImportError(
                f"`import {room}` finds {where} instead of {_ROOT / room}: another package or folder of that name "
                f"shadows eva-megatron's; start from {_ROOT}, or uninstall or rename the other one"
            )


_refuse_shadowed_rooms()
