"""The training config from YAML plus dotted overrides.

Fields are in engine/config/schema.py, checks in engine/config_*checks.py, the phases of a job in
engine/config/phases.py.

Order of precedence: defaults < model preset < config file < `dotted.key=value` arguments. `load_config` returns the
resolved tree; what it accepts works together or is refused here, before any process group exists.
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from engine.config.checks import ConfigError
from engine.config.layout import check_layout, check_vocabulary
from engine.config.phases import check_job
from engine.config.schema import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    HealthConfig,
    InitConfig,
    LogConfig,
    MimConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from engine.config.tree import PRESETS, expand_shorthand, load_preset, merged
from models.config import LOCAL_KERNELS, ModelConfig

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "EvaluateConfig",
    "HealthConfig",
    "InitConfig",
    "LogConfig",
    "MimConfig",
    "OptimConfig",
    "ParallelConfig",
    "TrainConfig",
    "check_layout",
    "check_vocabulary",
    "load_config",
    "load_preset",
    "preset_model",
    "resolve",
    "to_dict",
]

_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {"mim": {"train": {"patch_dropout": 0.0}}}
"""What an objective changes of the defaults; the config file comes above it."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides, resolve the preset and check everything that needs no process group."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(tree).__name__}")
    return resolve(tree, overrides or [], source=str(path))


def resolve(tree: dict[str, Any], overrides: list[str], source: str = "config") -> Config:
    """The same from a mapping instead of a file."""
    given = OmegaConf.merge(expand_shorthand(tree), *(_parse_override(o) for o in overrides))
    layers = [OmegaConf.create(_OBJECTIVE_DEFAULTS.get(str(OmegaConf.select(given, "objective")), {}))]
    preset, teacher = OmegaConf.select(given, "model.preset"), OmegaConf.select(given, "mim.teacher_model.preset")
    if preset is not None:
        layers.append(OmegaConf.create({"model": load_preset(str(preset))}))
    if teacher is not None:
        layers.append(OmegaConf.create({"mim": {"teacher_model": load_preset(str(teacher))}}))
    config = merged([*layers, given], source)
    if config.objective == "mim" and config.mim.teacher_model is None and config.mim.teacher is not None:
        config.mim.teacher_model = _model_of_checkpoint(Path(config.mim.teacher))
    check_job(config, given_steps=OmegaConf.select(given, "train.steps"))
    return config


def _model_of_checkpoint(path: Path) -> ModelConfig:
    """The model of a checkpoint or run folder of ours."""
    if not path.is_dir():
        raise ConfigError(
            f"mim.teacher {path} is not a checkpoint or run folder: if it is a file in the authors' layout, name its "
            "model in mim.teacher_model (a preset, or a mapping)"
        )
    # Imported here, because torch comes with it: other configs answer before that.
    from engine.checkpoint.format.errors import CheckpointError
    from engine.checkpoint.format.folders import resolve_checkpoint
    from engine.checkpoint.format.manifest import read_manifest

    try:
        stored = read_manifest(resolve_checkpoint(path)).config["model"]
    except CheckpointError as error:
        raise ConfigError(f"mim.teacher: {error}") from None
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), stored, LOCAL_KERNELS))
    assert isinstance(model, ModelConfig)
    return model


def preset_model(name: str) -> ModelConfig:
    """The model of a preset, checked."""
    return resolve({"model": name, "data": {"shards": ["-"]}}, []).model


def to_dict(config: Config) -> dict[str, Any]:
    """Plain mapping of the resolved tree, as run_dir/config.yaml and checkpoints hold it."""
    return dataclasses.asdict(config)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form dotted.key=value")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value  # a brace pattern such as {00000..00031}.tar is not YAML
    if key == "data.shards" and isinstance(parsed, dict):
        parsed = value
    if isinstance(parsed, str):
        parsed = _number(parsed)
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return expand_shorthand(parsed)


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as a string; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text
