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
from engine.config.origin import origin
from engine.config.phases import Job, plan_job
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
    TeacherConfig,
    TrainConfig,
)
from engine.config.text import read_file
from engine.config.tree import PRESETS, Given, given_settings, load_preset, refuse_repeats, whole_model
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
    "Job",
    "LogConfig",
    "MimConfig",
    "OptimConfig",
    "ParallelConfig",
    "TeacherConfig",
    "TrainConfig",
    "check_layout",
    "check_vocabulary",
    "load_config",
    "load_preset",
    "preset_model",
    "read_given",
    "read_job",
    "refuse_repeats",
    "resolve",
    "to_dict",
]


def read_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """The job of a YAML file and a command line, checked as far as no process group is needed. Raises ConfigError."""
    return _job(read_given(path, overrides or []))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The whole config of such a job."""
    return read_job(path, overrides).config


def read_given(path: str | Path, overrides: list[str]) -> Given:
    """What a config file and a command line say. Raises ConfigError, also for a key given twice."""
    tree = read_file(Path(path))
    refuse_repeats(overrides)
    return given_settings(tree, overrides, str(path))


def resolve(tree: dict[str, Any], overrides: list[str], source: str = "config") -> Config:
    """The same from a mapping instead of a file; of equal overrides the last holds."""
    return _job(given_settings(tree, overrides, source)).config


def _job(given: Given) -> Job:
    tree = _with_teachers(given.tree())
    mim = tree.get("mim", {})
    objective = OBJECTIVES.get(str(tree.get("objective")))
    if (
        objective is not None
        and objective.distils
        and mim.get("teacher_model") is None
        and mim.get("teacher") is not None
    ):
        model = _model_of_checkpoint(Path(mim["teacher"]), "mim.teacher", "mim.teacher_model")
        tree = merged(tree, {"mim": {"teacher_model": model}})
    return plan_job(built(Config, tree), given_steps=tree.get("train", {}).get("steps"), origin=origin(given))


def _with_teachers(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the whole model of every teacher in train.distill, of the job and of its phases."""
    train = tree.get("train", {})
    if "distill" in train:
        tree = merged(tree, {"train": {"distill": _teachers(train["distill"])}})
    if any("distill" in phase.get("train", {}) for phase in tree.get("phases", [])):
        return tree | {"phases": [_with_teachers(phase) for phase in tree["phases"]]}
    return tree


def _teachers(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for number, entry in enumerate(entries):
        key, model = f"train.distill[{number}]", entry.get("model")
        if model is not None:
            model = whole_model(model)
        elif entry.get("path"):  # without one the check refuses the entry
            model = _model_of_checkpoint(Path(entry["path"]), f"{key}.path", f"{key}.model")
        found.append(entry | {"model": model})
    return found


def _model_of_checkpoint(path: Path, key: str, model_key: str) -> dict[str, Any]:
    """The model of a checkpoint or run folder of ours, with the kernels of this machine. key: who names the folder."""
    if not path.is_dir():
        raise ConfigError(
            f"{key} {path} is not a checkpoint or run folder: if it is a file in the authors' layout, name its "
            f"model in {model_key} (a preset, or a mapping)"
        )
    # Imported here, because torch comes with it: other configs answer before that.
    from engine.checkpoint.format.errors import CheckpointError
    from engine.checkpoint.format.folders import resolve_checkpoint
    from engine.checkpoint.format.manifest import read_manifest

    try:
        stored = read_manifest(resolve_checkpoint(path)).config["model"]
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from None
    return typed(merged(stored, LOCAL_KERNELS), ModelConfig, f"{key} {path}: model")


def preset_model(name: str) -> ModelConfig:
    """The model of a preset or a file, checked; in bf16, which every kernel that it may name can do."""
    return resolve({"model": name, "data": {"shards": ["-"]}, "train": {"precision": "bf16"}}, []).model


def to_dict(config: Config) -> dict[str, Any]:
    """Plain mapping of the resolved tree, as run_dir/config.yaml and checkpoints hold it."""
    return dataclasses.asdict(config)
