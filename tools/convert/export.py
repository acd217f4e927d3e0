"""Export of a checkpoint's weights to other formats."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.pixels.transforms import PIXEL_NORMS
from engine.checkpoint.format.disk import write_synced
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import resolve_checkpoint
from engine.checkpoint.format.manifest import WEIGHT
from engine.checkpoint.format.tensor_file import TensorSpec
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.write import FILE_BYTES, refuse_existing
from engine.config.read import ConfigError, resolve
from models.config import ModelConfig
from models.formats import family, layout_of
from models.formats.authors import AUTHORS
from models.formats.base import Entry, entries
from models.formats.eva_config import eva_from_model
from models.formats.eva_names import authors_name
from models.formats.hf_config import hf_from_model
from models.formats.image_tower_config import image_tower_from_model
from models.formats.open_clip_config import open_clip_from_model
from models.formats.transformers_config import transformers_from_model
from models.tensors.inventory import MIM_TENSORS
from tools.cli import check_folder, hashing, progress
from tools.convert.hub_tokenizer import hub_tokenizer
from tools.convert.outputs import Report, cast, check_new_file, check_weights_file, dtype_of, write_weights

_SCALE = "logit_scale.log_scale"
_BIAS = "logit_bias."
"""Bias of the sigmoid loss, which the authors' code and CLIPModel have no place for."""


class _Weights:
    """The weights of a checkpoint and its model, with the temperature of the run as a tensor where it was fixed."""

    def __init__(self, path: Path, dtype: str | None, kind: str):
        """kind: WEIGHT or AVERAGE."""
        self.checkpoint, self._kind = Checkpoint(resolve_checkpoint(path)), kind
        self.checkpoint.kind(kind)  # raises where there is none
        config = self.checkpoint.manifest.config
        self.model: ModelConfig = resolve({"model": config["model"], "data": {"shards": ["-"]}}, []).model
        self._dtype = dtype
        shapes = self.checkpoint.shapes()
        fixed = config.get("train", {}).get("logit_scale")
        is_clip = any(name.startswith("text.") for name in shapes) and any(n.startswith("vision.") for n in shapes)
        self.fixed_scale: float | None = fixed if is_clip and _SCALE not in shapes else None
        self.shapes: dict[str, tuple[int, ...]] = shapes | ({_SCALE: (1,)} if self.fixed_scale else {})
        """Logical name -> shape of what is exported."""

    def dtype(self, name: str) -> torch.dtype:
        if name == _SCALE and self.fixed_scale:
            return torch.float32
        return dtype_of(
            name, self.checkpoint.manifest.tensors[self.checkpoint.key(name, self._kind)].dtype, self._dtype
        )

    def read(self, name: str) -> Tensor:
        if name == _SCALE and self.fixed_scale:
            return torch.tensor([math.log(self.fixed_scale)])
        return cast(name, self.checkpoint.read_whole(name, self._kind), self.dtype(name))

    def log_scale(self) -> float | None:
        """ln of the temperature's inverse, learned or fixed; None where the checkpoint has none."""
        return float(self.read(_SCALE)) if _SCALE in self.shapes else None

    def remarks(self) -> list[str]:
        if not self.fixed_scale:
            return []
        value = math.log(self.fixed_scale)
        return [f"{_SCALE} = {value:.4f} is ln of train.logit_scale={self.fixed_scale:g}, which the run kept fixed"]


def export_single_file(
    path: Path, out: Path, layout_name: str, dtype: str | None, config_out: Path | None, kind: str = WEIGHT
) -> Report:
    """One file in the authors' or the open_clip layout. kind: WEIGHT or AVERAGE."""
    check_weights_file(out)
    if config_out is not None:
        check_new_file(config_out)
    weights = _Weights(path, dtype, kind)
    table, left_out = _table(weights, layout_name)
    rename = _file_names(weights, layout_name)
    of_model = {"eva": eva_from_model, "openclip": _open_clip_json}.get(layout_name, _no_json)
    config = json.dumps(of_model(weights.model), indent=1).encode() if config_out is not None else b""
    check_weights_file(out, sum(_size(weights, entry) for entry in table))
    _verify(weights.checkpoint)
    _write(out, weights, table, rename)
    if config_out is not None:
        write_synced(config_out, config)
    summary = f"{out}: {len(table)} logical tensors"
    return Report(
        _report(left_out, table, rename), summary, [*_said(left_out), *_added(weights, table), *weights.remarks()]
    )


def _file_names(weights: _Weights, layout_name: str) -> Callable[[str], str]:
    """MIM students are kept without the `visual.` prefix, as the authors keep them."""
    if layout_name == "eva" and set(MIM_TENSORS) & weights.shapes.keys():
        return lambda name: name.removeprefix("visual.")
    return lambda name: name


def export_tower(path: Path, out: Path, tower: str, dtype: str | None, kind: str = WEIGHT) -> Report:
    """One tower under this project's logical names, in their own shapes. kind: WEIGHT or AVERAGE."""
    check_weights_file(out)
    weights = _Weights(path, dtype, kind)
    shapes = {n: s for n, s in weights.shapes.items() if n.startswith(f"{tower}.")}
    if not shapes:
        raise CheckpointError(f"{weights.checkpoint.folder} holds no {tower} tower")
    specs = [TensorSpec(name, weights.dtype(name), shape) for name, shape in shapes.items()]
    check_weights_file(out, sum(spec.size_bytes for spec in specs))
    _verify(weights.checkpoint)
    config = json.dumps(weights.checkpoint.manifest.config["model"])
    with progress("converting", sum(spec.size_bytes for spec in specs) / 1e6, "MB") as done:
        write_weights(out, specs, _counted(map(weights.read, shapes), done), {"model": config, "tower": tower})
    return Report([f"{name} -> {name}" for name in shapes], f"{out}: {len(shapes)} tensors")


def _verify(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for files that are not what was written."""
    with hashing(checkpoint.manifest.size_bytes()) as hashed:
        checkpoint.verify(hashed)


def export_huggingface(path: Path, out: Path, dtype: str | None, kind: str = WEIGHT) -> Report:
    """A folder with config.json, safetensors files and their index. kind: WEIGHT or AVERAGE."""
    refuse_existing(out)
    check_folder(out)
    weights = _Weights(path, dtype, kind)
    table, left_out = _table(weights, "hf")
    has_text = table[0].layout.has_place("text.positional_embedding")
    _hf_json(weights)  # raises before the work
    total = sum(_size(weights, entry) for entry in table)
    check_folder(out, total)
    _verify(weights.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    groups = _grouped(weights, table)
    index: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write(out / name, weights, group, lambda key: key)
        index |= {key: name for entry in group for key in entry.theirs}
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_synced(out / "model.safetensors.index.json", json.dumps(content, indent=1).encode())
    config = _hf_json(weights)
    write_synced(out / "config.json", json.dumps(config, indent=1).encode())
    tokenizer, said = hub_tokenizer(weights.model.text, weights.checkpoint.manifest.config.get("data", {}))
    hub = _hub_files(weights.model) | (tokenizer if has_text else {})
    for name, file in hub.items():
        write_synced(out / name, file)
    summary = f"{out}: {len(index)} tensors in {len(groups)} files"
    remarks = [*_said(left_out), *(said if has_text else []), *weights.remarks()]
    return Report(_report(left_out, table, lambda key: key), summary, remarks)


def _hf_json(weights: _Weights) -> dict[str, Any]:
    kind, log_scale = family(weights.model), weights.log_scale()
    if kind == "eva":
        return hf_from_model(weights.model, log_scale)
    if kind in ("dinov3", "internvit"):
        return image_tower_from_model(weights.model, kind)
    return transformers_from_model(weights.model, kind, log_scale)


def _hub_files(model: ModelConfig) -> dict[str, bytes]:
    """What transformers needs beside config and weights: EVA's classes, how pictures are prepared."""
    mean, std = PIXEL_NORMS[model.vision.pixel_norm]
    side = {"height": model.vision.image_size, "width": model.vision.image_size}
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True, "do_normalize": True,
        "size": {"shortest_edge": model.vision.image_size}, "crop_size": side, "resample": 3,
        "image_mean": list(mean), "image_std": list(std),
    }  # fmt: skip
    files = {"preprocessor_config.json": json.dumps(processor, indent=1).encode()}
    if family(model) == "eva":
        folder = Path(__file__).parent / "hub"
        names = ("configuration_eva_clip.py", "modeling_eva_clip.py")
        files |= {name: (folder / name).read_bytes() for name in names}
    return files


def _no_json(model: ModelConfig) -> dict[str, Any]:
    raise ConfigError("--to original writes names that have no model json of their own: leave --config-out out")


def _open_clip_json(model: ModelConfig) -> dict[str, Any]:
    if family(model) == "eva":
        raise ConfigError("open_clip knows its EVA-02 models by name, without a json: leave --config-out out")
    return open_clip_from_model(model)


def _added(weights: _Weights, table: list[Entry]) -> list[str]:
    """Remarks on learned tensors that the layout has and the model has not."""
    added = table[0].layout.derived(weights.model)
    return [f"{name}: zeros, the model has none" for name, value in added.items() if not value.any()]


def _said(left_out: list[str]) -> list[str]:
    """Remarks on tensors without a place: one each, or one for a whole caption tower."""
    text = [name for name in left_out if name.startswith("text.")]
    said = [f"{name} -> left out (no place in this layout)" for name in left_out if name not in text]
    return said + ([f"text.* -> {len(text)} tensors left out (no place in this layout)"] if text else [])


def _table(weights: _Weights, layout_name: str) -> tuple[list[Entry], list[str]]:
    """What is written, and the logical tensors that are not."""
    shapes = weights.shapes
    has_bias = layout_name == "openclip" or (layout_name == "hf" and family(weights.model) == "siglip")
    layout = layout_of(layout_name, weights.model)
    left_out = [name for name in shapes if name.startswith(_BIAS) and not has_bias]
    left_out += [name for name in shapes if name not in left_out and not layout.has_place(authors_name(name))]
    has_both_towers = layout.has_place("text.positional_embedding")
    if layout is not AUTHORS and has_both_towers and set(MIM_TENSORS) & shapes.keys():
        raise ConfigError(f"a MIM student has no place in the {layout_name} layout: use --to eva or --to tower")
    kept = {name: shape for name, shape in shapes.items() if name not in left_out}
    table = entries(layout, weights.model, kept)
    return table, left_out


def _size(weights: _Weights, entry: Entry) -> int:
    return torch.Size(weights.shapes[entry.ours]).numel() * weights.dtype(entry.ours).itemsize


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
    specs = [
        TensorSpec(rename(name), weights.dtype(entry.ours), shape)
        for entry in table
        for name, shape in entry.their_shapes(weights.shapes[entry.ours]).items()
    ]
    derived = {rename(name): value for name, value in table[0].layout.derived(weights.model).items()}
    if derived:
        dtype = weights.dtype("vision.embed.pos_embed")
        derived = {name: value.to(dtype) for name, value in derived.items()}
        specs += [TensorSpec(name, dtype, tuple(value.shape)) for name, value in derived.items()]
    tensors = chain(_their_tensors(weights, table), derived.values())
    with progress(f"writing {out.name}", sum(spec.size_bytes for spec in specs) / 1e6, "MB") as done:
        write_weights(out, specs, _counted(tensors, done), {"format": "pt"})


def _counted(tensors: Iterable[Tensor], done: Callable[[float], None]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield tensor
        done(tensor.nbytes / 1e6)


def _their_tensors(weights: _Weights, table: list[Entry]) -> Iterator[Tensor]:
    for entry in table:
        yield from entry.to_theirs(weights.read(entry.ours))


def _report(left_out: list[str], table: list[Entry], rename: Callable[[str], str]) -> list[str]:
    lines = [f"{entry.ours} -> {' + '.join(map(rename, entry.theirs))}" for entry in table]
    return lines + [f"{name} -> left out (no place in this layout)" for name in left_out]
