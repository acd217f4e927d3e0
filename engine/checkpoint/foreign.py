"""A state dict of another project in one of the layouts, seen as logical tensors; strict about names and shapes."""

import torch
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.matching import compare
from engine.checkpoint.state_dicts.files import FLOATS, State
from models.config import ModelConfig
from models.formats import recognised
from models.formats.base import Entry, Layout, StateKind, entries, expected_shapes, state_kind
from models.formats.eva_names import LayoutMismatch

_SHOWN = 6
"""Names of each list that a refusal shows."""


class ForeignWeights:
    """A state dict of another layout, seen as logical tensors; strict about every name and shape."""

    def __init__(self, state: State, layout: Layout, model: ModelConfig, source: str):
        """Raises LayoutMismatch with the missing, unexpected and mismatched tensors, in one line."""
        self.state, self.layout, self.model, self.source = state, layout, model, source
        self.name_in_file = {layout.normalised(name): name for name in state.shapes}
        self.derived = sorted(name for name in self.name_in_file if layout.is_derived(name))
        names = [name for name in self.name_in_file if not layout.is_derived(name)]
        self.kind: StateKind = self._kind_of(names)
        self.logical = expected_shapes(self.kind, names, layout, model, self._target_width())
        self.entries: dict[str, Entry] = {e.ours: e for e in entries(layout, model, self.logical)}
        self._check(names)

    def _kind_of(self, names: list[str]) -> StateKind:
        try:
            return state_kind(names, self.layout)
        except LayoutMismatch as error:
            other = recognised(self.name_in_file.keys())
            held = ", ".join(names[:3]) or "nothing"
            cure = f"its names are those of --from {other}" if other else f"it holds {held}"
            raise LayoutMismatch(f"{self.source}: {error}; {cure}") from None

    def _target_width(self) -> int:
        key = self.name_in_file.get("visual.lm_head.weight")
        return self.state.shapes[key][0] if key else 0

    def _check(self, names: list[str]) -> None:
        wanted = {n: s for e in self.entries.values() for n, s in e.their_shapes(self.logical[e.ours]).items()}
        offered = {name: self.state.shapes[self.name_in_file[name]] for name in names}
        alike = {name: wanted[name] if _same(shape, wanted.get(name)) else shape for name, shape in offered.items()}
        found = compare(wanted, alike)
        if found:
            lists = {
                "missing": found.missing,
                "unexpected": [f"{self._key(name)} {list(offered[name])}" for name in found.unexpected],
                "mismatched": [
                    f"{self._key(n)} is {list(offered[n])}, the model has {list(wanted[n])}" for n in found.mismatched
                ],
            }
            said = "; ".join(f"{len(items)} {what}: {_some(items)}" for what, items in lists.items() if items)
            raise LayoutMismatch(f"{self.source} is not the model of the config in the {self.layout.name}: {said}")
        for name in wanted:
            dtype = self.state.dtypes[self.name_in_file[name]]
            if dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.source}: entry {self._key(name)} is {str(dtype).removeprefix('torch.')}: weights are "
                    "read in float64, float32, float16 and bfloat16; dequantise it first"
                )

    def _key(self, name: str) -> str:
        return self.state.keys[self.name_in_file[name]]

    def keys_of(self, name: str) -> list[str]:
        """Keys of the file that hold a logical tensor."""
        return [self._key(theirs) for theirs in self.entries[name].theirs]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name -> shape."""
        return self.logical

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a logical tensor."""
        return self.state.dtypes[self.name_in_file[self.entries[name].theirs[0]]]

    def read_whole(self, name: str) -> Tensor:
        """A logical tensor."""
        entry = self.entries[name]
        shapes = entry.their_shapes(self.logical[name])
        parts = [self.state.read(self.name_in_file[theirs]).reshape(shapes[theirs]) for theirs in entry.theirs]
        return entry.to_ours(parts).view(self.logical[name])

    def read(self, name: str, where: FlatSlice) -> Tensor:
        """Some elements of a logical tensor, 1-D."""
        return where.extract(self.read_whole(name))


def _same(one: tuple[int, ...], other: tuple[int, ...] | None) -> bool:
    """Whether two shapes differ in sides of 1 only: writers keep a scalar as [] or [1], a class token as [1, 1, H]."""
    return other is not None and [n for n in one if n != 1] == [n for n in other if n != 1]


def _some(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
