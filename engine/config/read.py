"""The training config from YAML plus dotted overrides.

Fields are in engine/config/schema.py, checks beside them, the phases of a job in engine/config/phases.py.

Order of precedence: defaults < model preset < config file < `dotted.key=value` arguments; a preset among the arguments
replaces the whole model of the file. What is accepted works together or is refused here, before any process
group exists.
"""

import dataclasses
from pathlib import Path
from typing import Any

from engine.config.errors import ConfigError
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
from engine.config.text import read_file
from engine.config.tree import PRESETS, Given, given_settings, load_preset, refuse_repeats
from engine.config.typed import built, merged, typed
from engine.objectives.registry import OBJECTIVES
from models.config import LOCAL_KERNELS, ModelConfig

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "EvaluateConfig",
    "Given",
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
    "read_given",
    "refuse_repeats",
    "resolve",
    "resolve_given",
    "to_dict",
]


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides, resolve the preset and check everything that needs no process group."""
    return resolve_given(read_given(path, overrides or []))


def read_given(path: str | Path, overrides: list[str]) -> Given:
    """What a config file and a command line say. Raises ConfigError, also for a key given twice."""
    tree = read_file(Path(path))
    refuse_repeats(overrides)
    return given_settings(tree, overrides, str(path))


def resolve(tree: dict[str, Any], overrides: list[str], source: str = "config") -> Config:
    """The same from a mapping instead of a file; of equal overrides the last holds."""
    return resolve_given(given_settings(tree, overrides, source))


def resolve_given(given: Given) -> Config:
    """The whole config, checked."""
    tree = given.tree()
    mim = tree.get("mim", {})
    objective = OBJECTIVES.get(str(tree.get("objective")))
    if (
        objective is not None
        and objective.distils
        and mim.get("teacher_model") is None
        and mim.get("teacher") is not None
    ):
        tree = merged(tree, {"mim": {"teacher_model": _model_of_checkpoint(Path(mim["teacher"]))}})
    config = built(Config, tree)
    check_job(config, given_steps=tree.get("train", {}).get("steps"))
    return config


def _model_of_checkpoint(path: Path) -> dict[str, Any]:
    """The model of a checkpoint or run folder of ours, with the kernels of this machine."""
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
    return typed(merged(stored, LOCAL_KERNELS), ModelConfig, f"mim.teacher {path}: model")


def preset_model(name: str) -> ModelConfig:
    """The model of a preset, checked."""
    return resolve({"model": name, "data": {"shards": ["-"]}}, []).model


def to_dict(config: Config) -> dict[str, Any]:
    """Plain mapping of the resolved tree, as run_dir/config.yaml and checkpoints hold it."""
    return dataclasses.asdict(config)
