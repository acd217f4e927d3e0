"""Weights in files of other projects: safetensors (one, or several with an index) and .pt, one tensor at a time.

A .pt file is unpickled with weights_only and mapped, not read: it may come from anywhere, and be larger than memory.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.tensor_file import TensorFile
from models.config import ModelConfig
from models.formats.authors import WRAPPERS
from models.formats.base import Entry, Layout, StateKind, entries, expected_shapes, state_kind
from models.formats.eva_names import LayoutMismatch

_INDEX = "model.safetensors.index.json"


class State(Protocol):
    """A state dict on disk."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor: ...


class SafetensorsState:
    """One or more safetensors files as one state dict."""

    def __init__(self, files: list[Path]):
        self._at: dict[str, TensorFile] = {}
        for path in files:
            opened = TensorFile(path)
            twice = sorted(self._at.keys() & opened.specs.keys())
            if twice:
                raise CheckpointError(f"{twice[0]} is in {self._at[twice[0]].path} and again in {path}")
            self._at |= dict.fromkeys(opened.specs, opened)
        self.shapes = {name: file.specs[name].shape for name, file in self._at.items()}
        self.dtypes = {name: file.specs[name].dtype for name, file in self._at.items()}

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._at[name].read(name).view(self.shapes[name])


class TorchState:
    """A .pt file; the state dict may stand under `model`, `module` or `state_dict`."""

    def __init__(self, path: Path):
        self._state = _unwrapped(_load_torch(path), path)
        self.shapes = {name: tuple(value.shape) for name, value in self._state.items()}
        self.dtypes = {name: value.dtype for name, value in self._state.items()}

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._state[name]


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written before torch 1.6, not a zip: cannot be mapped
        pass
    except (OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read with weights_only: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read with weights_only: {error}") from error


def _unwrapped(content: Any, path: Path) -> Mapping[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        kind = type(content).__name__
        raise CheckpointError(f"{path} holds no state dict (flat, or under {', '.join(WRAPPERS)}), but a {kind}")
    return content


def open_state(path: Path) -> State:
    """A .safetensors file, a folder with an index or with safetensors files, or a .pt/.pth/.bin file."""
    if path.is_dir():
        return SafetensorsState(_files_of(path))
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    return SafetensorsState([path]) if path.suffix == ".safetensors" else TorchState(path)


def _files_of(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no safetensors file")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} points outside its folder: {outside[0]}")
    return [folder / name for name in names]


class ForeignWeights:
    """A state dict of another layout, seen as logical tensors; strict about every name and shape."""

    def __init__(self, state: State, layout: Layout, model: ModelConfig, source: str):
        """Raises LayoutMismatch with the list of missing, extra and mis-shaped tensors."""
        self.state, self.layout, self.model = state, layout, model
        self.name_in_file = {layout.normalised(key): key for key in state.shapes}
        self.derived = sorted(name for name in self.name_in_file if layout.is_derived(name))
        names = [name for name in self.name_in_file if not layout.is_derived(name)]
        self.kind: StateKind = state_kind(names, layout)
        target = self._target_width()
        self.logical = expected_shapes(self.kind, names, layout, model, target)
        self.entries: dict[str, Entry] = {e.ours: e for e in entries(layout, model, self.logical)}
        self._check(names, source)

    def _target_width(self) -> int:
        key = self.name_in_file.get("visual.lm_head.weight")
        return self.state.shapes[key][0] if key else 0

    def _check(self, names: list[str], source: str) -> None:
        wanted = {n: s for e in self.entries.values() for n, s in e.their_shapes(self.logical[e.ours]).items()}
        missing, extra = sorted(wanted.keys() - set(names)), sorted(set(names) - wanted.keys())
        bent = [
            f"{name} is {list(shape)}, the model has {list(wanted[name])}"
            for name in sorted(wanted.keys() & set(names))
            if (shape := self.state.shapes[self.name_in_file[name]]) != wanted[name]
        ]
        if missing or extra or bent:
            problems = [("missing", missing), ("unknown", extra), ("of another shape", bent)]
            lines = "\n".join(f"  {what}, {len(found)}: {', '.join(found[:20])}" for what, found in problems if found)
            raise LayoutMismatch(f"{source} is not the model of the config in the {self.layout.name}:\n{lines}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name -> shape."""
        return self.logical

    def dtype(self, name: str) -> torch.dtype:
        """Of a logical tensor."""
        return self.state.dtypes[self.name_in_file[self.entries[name].theirs[0]]]

    def read_whole(self, name: str) -> Tensor:
        """A logical tensor."""
        entry = self.entries[name]
        value = entry.to_ours([self.state.read(self.name_in_file[theirs]) for theirs in entry.theirs])
        return value.view(self.logical[name])

    def read(self, name: str, where: FlatSlice) -> Tensor:
        """Some elements of a logical tensor, 1-D."""
        return where.extract(self.read_whole(name))
