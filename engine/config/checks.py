"""Checks of a config, section by section, that need no process group. What they accept works together.

Beside them: what an objective needs (engine/objectives), the ranks (layout.py).
"""

import re

from data.errors import DataError
from engine.config.errors import ConfigError, require
from engine.config.schema import Config
from engine.config.sections.checkpoint import check_best, check_checkpoint
from engine.config.sections.evaluate import check_evaluate
from engine.config.sections.health import check_health
from engine.config.sections.init import check_init
from engine.config.sections.log import check_log
from engine.config.sections.optim import check_optim
from engine.config.sections.parallel import check_parallel
from engine.config.sections.train import check_train
from engine.objectives.registry import objective_of
from models.config import ModelConfigError

_CREDENTIALS = re.compile(r"[\w+.-]+://[^/@]*:[^/@]*@(?P<host>[^/]*)")


def check(config: Config) -> None:
    """Raise ConfigError for the first thing that cannot be run."""
    try:
        config.model.check()
    except ModelConfigError as error:
        raise ConfigError(str(error)) from None
    _check_run_dir(config.run_dir)
    _check_data(config)
    _check_secrets(config)
    check_parallel(config)
    check_train(config)
    check_optim(config.optim)
    check_checkpoint(config.checkpoint)
    check_init(config.init)


def check_run(config: Config) -> None:
    """Raise ConfigError for the first thing around the steps that cannot be run."""
    objective = objective_of(config)
    check_health(config.health, checkpoints=config.checkpoint.every_steps > 0)
    check_evaluate(config, reads_captions=objective.reads_captions)
    check_best(config, objective.unmeasured(config))
    check_log(config.log)


def _check_run_dir(run_dir: str) -> None:
    require(bool(run_dir.strip()), "run_dir is empty: name the folder that the job writes to")
    require("\0" not in run_dir, f"run_dir is {run_dir!r}: no folder can have that name")
    require(
        not run_dir.startswith("~"),
        f"run_dir is {run_dir!r}: only a shell knows ~, write the whole path (run_dir=$HOME/… on a command line)",
    )


def _check_data(config: Config) -> None:
    try:
        config.data.check()
    except DataError as error:
        raise ConfigError(str(error)) from None
    frames, micro = config.data.frames, config.train.micro_batch_size
    require(
        micro % frames == 0,
        f"train.micro_batch_size {micro} counts images and holds whole clips: use a multiple of data.frames {frames}",
    )
    batch = config.train.global_batch_size
    for switch in config.data.mixture_schedule:
        require(
            config.data.mix != "one_per_batch" or switch.at_samples % batch == 0,
            f"data.mixture_schedule switches at {switch.at_samples} samples, within a batch of train.global_batch_size "
            f"{batch} that data.mix=one_per_batch takes from one source: use a multiple of {batch}",
        )


def _check_secrets(config: Config) -> None:
    """The config is printed, written to run_dir and kept in checkpoints, so it holds no password."""
    given = {"data.shards": config.data.shards, "evaluate.shards": config.evaluate.shards}
    given |= {f"data.sources {source.name}": source.shards for source in config.data.sources}
    for key, shards in given.items():
        found = next(filter(None, map(_CREDENTIALS.match, shards)), None)
        require(
            found is None,
            f"{key} holds a password for {found['host'] if found else ''}: it would be written to logs, run_dir and "
            "checkpoints; keep it where the store's package looks for it (~/.netrc, ~/.aws, the environment)",
        )
