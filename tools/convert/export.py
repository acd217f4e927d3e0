"""From a checkpoint's weights to other layouts."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import resolve_checkpoint
from engine.checkpoint.format.manifest import WEIGHT, write_synced
from engine.checkpoint.format.tensor_file import TensorSpec, write_tensor_file
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.write import FILE_BYTES
from engine.config.read import ConfigError, resolve
from models.config import ModelConfig
from models.formats import layout_of
from models.formats.base import Entry, entries
from models.formats.eva_config import eva_from_model
from models.formats.hf_config import hf_from_model
from models.tensors.inventory import MIM_TENSORS
from tools.convert.importing import DTYPES

_CLIP_ONLY = ("logit_bias.",)
"""Tensors of training that no other layout has a place for."""


class _Weights:
    """The weights of a verified checkpoint and its model."""

    def __init__(self, path: Path, dtype: str | None, kind: str):
        """kind: WEIGHT or AVERAGE."""
        self.checkpoint, self._kind = Checkpoint(resolve_checkpoint(path)), kind
        self.checkpoint.verify()
        self.checkpoint.kind(kind)  # raises where there is none
        self.model: ModelConfig = resolve(
            {"model": self.checkpoint.manifest.config["model"], "data": {"shards": ["-"]}}, []
        ).model
        self._dtype = DTYPES[dtype] if dtype else None

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self.checkpoint.manifest.tensors[f"{self._kind}/{name}"].dtype

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read_whole(name, self._kind).to(self.dtype(name))


def export_single_file(
    path: Path, out: Path, layout_name: str, dtype: str | None, config_out: Path | None, kind: str = WEIGHT
) -> list[str]:
    """One safetensors file in the authors' or the open_clip layout; returns the report. kind: WEIGHT or AVERAGE."""
    weights = _Weights(path, dtype, kind)
    table, left_out = _table(weights, layout_name)
    if config_out is not None:
        write_synced(config_out, json.dumps(eva_from_model(weights.model), indent=1).encode())
    rename = _file_names(weights, layout_name)
    _write(out, weights, table, rename)
    return [*_report(weights, table, rename), *left_out, f"{out}: {len(table)} logical tensors"]


def _file_names(weights: _Weights, layout_name: str) -> Callable[[str], str]:
    """MIM students are kept without the `visual.` prefix, as the authors keep them."""
    if layout_name == "eva" and set(MIM_TENSORS) & weights.checkpoint.shapes().keys():
        return lambda name: name.removeprefix("visual.")
    return lambda name: name


def export_tower(path: Path, out: Path, tower: str, dtype: str | None, kind: str = WEIGHT) -> list[str]:
    """One tower under this project's logical names, in their own shapes. kind: WEIGHT or AVERAGE."""
    weights = _Weights(path, dtype, kind)
    shapes = {n: s for n, s in weights.checkpoint.shapes().items() if n.startswith(f"{tower}.")}
    if not shapes:
        raise CheckpointError(f"{weights.checkpoint.folder} holds no {tower} tower")
    specs = [TensorSpec(name, weights.dtype(name), shape) for name, shape in shapes.items()]
    config = json.dumps(weights.checkpoint.manifest.config["model"])
    _replace(out, specs, (weights.read(name) for name in shapes), {"model": config, "tower": tower})
    return [*(f"{name} -> {name}" for name in shapes), f"{out}: {len(shapes)} tensors"]


def export_huggingface(path: Path, out: Path, dtype: str | None, kind: str = WEIGHT) -> list[str]:
    """A folder with config.json, safetensors files and their index. kind: WEIGHT or AVERAGE."""
    weights = _Weights(path, dtype, kind)
    table, left_out = _table(weights, "hf")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty: name another folder")
    groups = _grouped(weights, table)
    index: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write(out / name, weights, group, lambda key: key)
        index |= {key: name for entry in group for key in entry.theirs}
    total = sum(_size(weights, entry) for entry in table)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_synced(out / "model.safetensors.index.json", json.dumps(content, indent=1).encode())
    write_synced(out / "config.json", json.dumps(hf_from_model(weights.model), indent=1).encode())
    return [*_report(weights, table, lambda key: key), *left_out, f"{out}: {len(index)} tensors in {len(groups)} files"]


def _table(weights: _Weights, layout_name: str) -> tuple[list[Entry], list[str]]:
    shapes = weights.checkpoint.shapes()
    left_out = [name for name in shapes if name.startswith(_CLIP_ONLY)]
    if layout_name != "eva" and set(MIM_TENSORS) & shapes.keys():
        raise ConfigError(f"a MIM student has no place in the {layout_name} layout: use --to eva or --to tower")
    kept = {name: shape for name, shape in shapes.items() if name not in left_out}
    table = entries(layout_of(layout_name, weights.model), weights.model, kept)
    return table, [f"{name} -> left out (no place in this layout)" for name in left_out]


def _size(weights: _Weights, entry: Entry) -> int:
    return torch.Size(weights.checkpoint.shapes()[entry.ours]).numel() * weights.dtype(entry.ours).itemsize


def _grouped(weights: _Weights, table: list[Entry]) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in table:
        size += _size(weights, entry)
        if groups[-1] and size > FILE_BYTES:
            groups.append([])
            size = _size(weights, entry)
        groups[-1].append(entry)
    return groups


def _write(out: Path, weights: _Weights, table: list[Entry], rename: Callable[[str], str]) -> None:
    shapes = weights.checkpoint.shapes()
    specs = [
        TensorSpec(rename(name), weights.dtype(entry.ours), shape)
        for entry in table
        for name, shape in entry.their_shapes(shapes[entry.ours]).items()
    ]
    dtype = weights.dtype("vision.embed.pos_embed")
    derived = {rename(name): value.to(dtype) for name, value in table[0].layout.derived(weights.model).items()}
    specs += [TensorSpec(name, dtype, tuple(value.shape)) for name, value in derived.items()]
    _replace(out, specs, chain(_their_tensors(weights, table), derived.values()), {"format": "pt"})


def _their_tensors(weights: _Weights, table: list[Entry]) -> Iterator[Tensor]:
    for entry in table:
        yield from entry.to_theirs(weights.read(entry.ours))


def _replace(out: Path, specs: list[TensorSpec], tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
    partial = out.with_name(out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    write_tensor_file(partial, specs, tensors, metadata)
    os.replace(partial, out)


def _report(weights: _Weights, table: list[Entry], rename: Callable[[str], str]) -> list[str]:
    return [f"{entry.ours} -> {' + '.join(map(rename, entry.theirs))}" for entry in table]
