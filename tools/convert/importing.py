"""Import of other formats as a checkpoint with weights only."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.pixels.transforms import PIXEL_NORMS
from engine.checkpoint.foreign import ForeignWeights
from engine.checkpoint.format.manifest import WEIGHT, Manifest
from engine.checkpoint.state_dicts.files import State, open_state, read_json
from engine.checkpoint.write import PlannedPart, refuse_existing, whole_tensors, write_checkpoint
from engine.config.read import ConfigError, preset_model, resolve, to_dict
from models.config import ModelConfig
from models.formats import family, layout_of
from models.formats.base import StateKind
from models.formats.eva_config import model_from_eva
from models.formats.hf_config import model_from_hf
from models.formats.image_tower_config import is_image_tower, model_from_image_tower
from models.formats.open_clip_config import is_open_clip, model_from_open_clip
from models.formats.transformers_config import model_from_transformers
from tools.cli import check_folder, progress
from tools.convert.outputs import Report, cast, dtype_of

_SIGLIP_HEAD, _CLIP_NORM = "vision_model.head.probe", "vision_model.pre_layrnorm.weight"
"""Tensors by which transformers' SiglipModel and CLIPModel are told from EvaCLIPModel."""
_FIXED_SCALE = 100.0
"""Value of train.logit_scale in a checkpoint whose file has no logit scale: the default of training."""

_TIMM_PRESETS = {
    "eva02_base_patch16_clip_224": "b16",
    "eva02_large_patch14_clip_224": "l14",
    "eva02_large_patch14_clip_336": "l14-336",
    "eva02_enormous_patch14_clip_224": "e14",
    "eva_giant_patch14_224": "eva01-g14",
    "eva_giant_patch14_clip_224": "eva01-g14",
}
"""Image towers that open_clip takes from timm -> preset with the same one."""


def import_weights(
    layout_name: str,
    weights: Path,
    out: Path,
    *,
    config: dict[str, Any] | None,
    preset: str | None,
    dtype: str | None,
    entry: str | None = None,
) -> Report:
    """Write `out`. Raises for anything that does not fit exactly. entry: of a .pt file, which holds the weights."""
    refuse_existing(out)
    check_folder(out)
    state = open_state(weights, entry)
    try:
        model, remarks = _model(layout_name, weights, state, config, preset)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"the model config is malformed ({type(error).__name__}: {error})") from error
    source = ForeignWeights(state, layout_of(layout_name, model), model, str(weights))
    tensors = [
        (f"{WEIGHT}/{name}", dtype_of(name, source.dtype(name), dtype), shape) for name, shape in source.logical.items()
    ]

    def read(part: PlannedPart) -> torch.Tensor:
        name = part.key.removeprefix(f"{WEIGHT}/")
        done(part.size_bytes / 1e6)
        return cast(name, source.read_whole(name), part.dtype)

    has_scale = "logit_scale.log_scale" in source.logical
    manifest = Manifest(
        content="weights",
        config=_config(model, has_scale, has_bias="logit_bias.bias" in source.logical),
        layout={"tensor": 1, "pipeline": 1, "data": 1},
        tensors={},
        files={},
        source=f"{source.layout.name}, {weights.name}",
    )
    files = whole_tensors(tensors)
    with progress("converting", sum(file.size_bytes for file in files) / 1e6, "MB") as done:
        write_checkpoint(out, files, read, manifest)
    if source.kind is StateKind.CLIP and not has_scale:
        remarks = [*remarks, f"no logit_scale in the file: the checkpoint says train.logit_scale={_FIXED_SCALE:g}"]
    remarks = [*remarks, *(f"{key} -> left out ({why})" for key, why in state.left_out.items())]
    table = _report(source, {key: dtype for key, dtype, _ in tensors})
    return Report(table, _summary(source, out), remarks)


def _model(
    layout_name: str, weights: Path, state: State, config: dict[str, Any] | None, preset: str | None
) -> tuple[ModelConfig, list[str]]:
    if preset is not None:
        return _with_projection_of(state, preset_model(preset))
    if config is not None and is_image_tower(config):
        return model_from_image_tower(config), []
    if config is None and layout_name == "hf":
        return _model_of_repository(weights, state)
    hub = weights / "open_clip_config.json"
    if config is None and layout_name == "openclip" and hub.is_file():
        config = read_json(hub)
    if config is None:
        raise ConfigError("--config FILE.json or --model PRESET must say which model the weights are of")
    if "model_cfg" in config:  # as open_clip keeps it on the hub
        model, remarks = _model(layout_name, weights, state, config["model_cfg"], None)
        model, more = _with_pixels_of(config.get("preprocess_cfg", {}), model)
        return model, [*remarks, *more]
    if layout_name == "openclip" and is_open_clip(config):
        return model_from_open_clip(config), []
    timm = config.get("vision_cfg", {}).get("timm_model_name")
    if timm is not None:
        return _model_of_open_clip(config, timm)
    model, remarks = model_from_eva(config)
    return _as_the_file_has_it(model, state, remarks)


def _with_projection_of(state: State, model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """Perception Encoder's projection has a bias in timm's files and none in its own."""
    has_bias = "visual.trunk.head.bias" in state.shapes
    if family(model) != "pe" or has_bias == model.vision.head_bias:
        return model, []
    changed = replace(model, vision=replace(model.vision, head_bias=has_bias))
    return changed, [f"model.vision.head_bias is {str(has_bias).lower()}, as in the file"]


def _with_pixels_of(preprocess: dict[str, Any], model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The model with pictures normalised as the file says, or a remark where no `pixel_norm` does it so."""
    clip = PIXEL_NORMS["clip"]
    wanted = tuple(preprocess.get(key, values) for key, values in zip(("mean", "std"), clip, strict=True))
    for name, ours in PIXEL_NORMS.items():
        if np.allclose(wanted, ours, rtol=0, atol=1e-6):
            return replace(model, vision=replace(model.vision, pixel_norm=name)), []
    kind = model.vision.pixel_norm
    return model, [
        f"preprocess_cfg has mean {list(wanted[0])} and std {list(wanted[1])}, which no model.vision.pixel_norm has: "
        f"pictures are normalised as {kind}, by {[list(values) for values in PIXEL_NORMS[kind]]}"
    ]


def _model_of_repository(weights: Path, state: State) -> tuple[ModelConfig, list[str]]:
    file = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file} does not exist: give the model with --config or --model")
    config = read_json(file)
    if is_image_tower(config):
        return model_from_image_tower(config), []
    kind = "siglip" if _SIGLIP_HEAD in state.shapes else "clip" if _CLIP_NORM in state.shapes else "eva"
    return model_from_hf(config, state.shapes.keys()) if kind == "eva" else (model_from_transformers(config, kind), [])


def _model_of_open_clip(config: dict[str, Any], timm: str) -> tuple[ModelConfig, list[str]]:
    if timm not in _TIMM_PRESETS:
        raise ConfigError(f"vision_cfg.timm_model_name {timm!r} is no EVA CLIP tower: {', '.join(_TIMM_PRESETS)}")
    text, remarks = model_from_eva({"embed_dim": config["embed_dim"], "text_cfg": config["text_cfg"]})
    return replace(text, vision=preset_model(_TIMM_PRESETS[timm]).vision), remarks


def _as_the_file_has_it(model: ModelConfig, state: State, remarks: list[str]) -> tuple[ModelConfig, list[str]]:
    """The EVA-02 MIM class has no inner attention norm where the CLIP class has one, under the same switch."""
    mim = any(name.endswith(("mask_token", "lm_head.weight")) for name in state.shapes)
    if not mim or not model.vision.attention_norm or any("inner_attn_ln" in name for name in state.shapes):
        return model, remarks
    vision = replace(model.vision, attention_norm=False)
    return replace(model, vision=vision), [
        *remarks,
        "a MIM student without inner_attn_ln: vision.attention_norm is off",
    ]


def _config(model: ModelConfig, has_scale: bool, has_bias: bool) -> dict[str, Any]:
    """A config whose job holds exactly these tensors."""
    train = {"logit_scale": None if has_scale else _FIXED_SCALE, "loss": "sigmoid" if has_bias else "softmax"}
    config = resolve({"data": {"shards": ["-"]}, "run_dir": "-", "train": train}, [])
    return to_dict(replace(config, model=model))


def _report(source: ForeignWeights, dtypes: dict[str, torch.dtype]) -> list[str]:
    lines = []
    for entry in source.entries.values():
        shape = "x".join(map(str, source.logical[entry.ours])) or "scalar"
        dtype = str(dtypes[f"{WEIGHT}/{entry.ours}"]).removeprefix("torch.")
        lines.append(f"{' + '.join(source.keys_of(entry.ours))} -> {entry.ours}  {shape} {dtype}")
    return lines + [
        f"{source.state.keys[source.name_in_file[name]]} -> left out ({source.layout.why_left_out(name)})"
        for name in source.derived
    ]


def _summary(source: ForeignWeights, out: Path) -> str:
    parameters = sum(torch.Size(shape).numel() for shape in source.logical.values())
    return (
        f"{out}: {source.kind.value}, {len(source.logical)} tensors, {parameters:,} parameters, "
        f"{len(source.derived)} derived tables left out"
    )
