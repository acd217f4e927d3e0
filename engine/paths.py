"""What a job reads and writes, looked at by every rank before any process group exists and any model is built."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.config import DataConfig
from data.errors import DataError
from data.shards.remote import is_remote
from data.sources import check_shards, shards_of
from engine.checkpoint.format.folders import step_folders
from engine.config.errors import ConfigError
from engine.config.phases import Job
from engine.config.schema import Config


def check_paths(job: Job) -> None:
    """Raise ConfigError or DataError for the first path that is not there, or for a run_dir that cannot be written.

    A fresh job needs the shards of all its phases and what it starts from, which may be gone when it goes on (it may
    have been its own, and no longer kept); a job that goes on is asked for the shards of its last phase only, and for
    the rest when it is known how far it is. Remote shards are left to those who read them.
    """
    config = job.config
    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    _check_writable(run_dir)
    begun = bool(step_folders(run_dir))
    fresh = resume == "none" or (resume == "auto" and not begun)
    if resume not in ("auto", "none") and not begun:
        _check_exists("checkpoint.resume", resume)
    for phase in job.phases if fresh else job.phases[-1:]:
        _check_shards(phase.config.data, f"phase {phase.name!r}: " if phase.name else "")
    _check_evaluation(config)
    if fresh:
        for part in ("vision", "text", "logit_scale"):
            _check_exists(f"init.{part}", getattr(config.init, part))
    _check_exists("mim.teacher", config.mim.teacher)
    for phase in job.phases:
        _check_exists("data.features", phase.config.data.features)
    for phase in job.phases:
        for number, teacher in enumerate(phase.config.train.distill):
            _check_exists(f"train.distill[{number}].path", teacher.path)


def _check_shards(data: DataConfig, where: str) -> None:
    local = replace(
        data,
        shards=_local(data.shards),
        sources=[replace(source, shards=_local(source.shards)) for source in data.sources if _local(source.shards)],
    )
    if local.shards or local.sources:
        try:
            check_shards(local)
        except DataError as error:
            raise DataError(f"{where}{error}") from None


def _local(shards: Sequence[str]) -> list[str]:
    return [entry for entry in shards if not is_remote(entry)]


def _check_evaluation(config: Config) -> None:
    if not config.evaluate.every_steps:
        return
    with shards_of("evaluate.shards"):
        _check_shards(DataConfig(shards=config.evaluate.shards), "")
    _check_exists("evaluate.classes", config.evaluate.classes)


def _check_exists(key: str, path: str | None) -> None:
    if path and not Path(path).exists():
        raise ConfigError(f"{key} {path} does not exist (looked for at {Path(path).absolute()})")


def _check_writable(run_dir: Path) -> None:
    place = run_dir.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"run_dir {run_dir} cannot be made: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir {run_dir} cannot be written: no permission in {place}")
