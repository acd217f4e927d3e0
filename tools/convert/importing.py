"""From other layouts to a checkpoint with weights only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.foreign import ForeignWeights, State, open_state
from engine.checkpoint.format.manifest import WEIGHT, Manifest
from engine.checkpoint.write import PlannedPart, refuse_existing, whole_tensors, write_checkpoint
from engine.config.read import ConfigError, preset_model, resolve, to_dict
from models.config import ModelConfig
from models.formats import layout_of
from models.formats.eva_config import model_from_eva
from models.formats.hf_config import model_from_hf

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_TIMM_PRESETS = {
    "eva02_base_patch16_clip_224": "b16",
    "eva02_large_patch14_clip_224": "l14",
    "eva02_large_patch14_clip_336": "l14-336",
    "eva02_enormous_patch14_clip_224": "e14",
}
"""Image towers that open_clip takes from timm -> preset with the same one."""


def import_weights(
    layout_name: str, weights: Path, out: Path, *, config: dict[str, Any] | None, preset: str | None, dtype: str | None
) -> list[str]:
    """Write `out`; returns the report, one line a tensor of the file. Raises for anything that does not fit exactly."""
    refuse_existing(out)
    state = open_state(weights)
    model, remarks = _model(layout_name, weights, state, config, preset)
    source = ForeignWeights(state, layout_of(layout_name, model), model, str(weights))
    tensors = [(f"{WEIGHT}/{name}", _dtype(source, name, dtype), shape) for name, shape in source.logical.items()]

    def read(part: PlannedPart) -> torch.Tensor:
        return source.read_whole(part.key.removeprefix(f"{WEIGHT}/")).to(part.dtype)

    manifest = Manifest(
        content="weights",
        config=_config(model, has_scale="logit_scale.log_scale" in source.logical),
        layout={"tensor": 1, "pipeline": 1, "data": 1},
        tensors={},
        files={},
        source=f"{source.layout.name}, {weights.name}",
    )
    write_checkpoint(out, whole_tensors(tensors), read, manifest)
    return [*_report(source, dict((key, d) for key, d, _ in tensors)), *remarks, _summary(source, out)]


def _dtype(source: ForeignWeights, name: str, wish: str | None) -> torch.dtype:
    return DTYPES[wish] if wish else source.dtype(name)


def _model(
    layout_name: str, weights: Path, state: State, config: dict[str, Any] | None, preset: str | None
) -> tuple[ModelConfig, list[str]]:
    if preset is not None:
        return preset_model(preset), []
    if config is None and layout_name == "hf":
        return _model_of_repository(weights, state)
    if config is None:
        raise ConfigError("--config EVA.json or --model PRESET must say which model the weights are of")
    timm = config.get("vision_cfg", {}).get("timm_model_name")
    if timm is not None:
        return _model_of_open_clip(config, timm)
    model, remarks = model_from_eva(config)
    return _as_the_file_has_it(model, state, remarks)


def _model_of_repository(weights: Path, state: State) -> tuple[ModelConfig, list[str]]:
    file = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file} does not exist: give the model with --config or --model")
    return model_from_hf(json.loads(file.read_text()), state.shapes.keys())


def _model_of_open_clip(config: dict[str, Any], timm: str) -> tuple[ModelConfig, list[str]]:
    if timm not in _TIMM_PRESETS:
        raise ConfigError(f"vision_cfg.timm_model_name {timm!r} is no EVA-02 CLIP tower: {', '.join(_TIMM_PRESETS)}")
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


def _config(model: ModelConfig, has_scale: bool) -> dict[str, Any]:
    """A config whose job holds exactly these tensors."""
    tree: dict[str, Any] = {"data": {"shards": ["-"]}, "run_dir": "-"}
    config = resolve(tree | {"train": {"logit_scale": None if has_scale else 100.0}}, [])
    return to_dict(replace(config, model=model))


def _report(source: ForeignWeights, dtypes: dict[str, torch.dtype]) -> list[str]:
    lines = []
    for entry in source.entries.values():
        shape = "x".join(map(str, source.logical[entry.ours])) or "scalar"
        keys = [source.name_in_file[name] for name in entry.theirs]
        dtype = str(dtypes[f"{WEIGHT}/{entry.ours}"]).removeprefix("torch.")
        lines.append(f"{' + '.join(keys)} -> {entry.ours}  {shape} {dtype}")
    return lines + [f"{source.name_in_file[name]} -> left out (computed from the config)" for name in source.derived]


def _summary(source: ForeignWeights, out: Path) -> str:
    parameters = sum(torch.Size(shape).numel() for shape in source.logical.values())
    return (
        f"{out}: {source.kind.value}, {len(source.logical)} tensors, {parameters:,} parameters, "
        f"{len(source.derived)} derived tables left out"
    )
