"""Entry point of torchrun: `torchrun --nproc-per-node N -m engine.train CONFIG.yaml [dotted.key=value …]`.

A mistake in the config, the layout, the shards or a checkpoint ends with one line that says what to do.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError
from engine.config.errors import require
from engine.config.phases import Job, naming
from engine.config.read import Config, ConfigError, check_layout, check_vocabulary, read_job, to_dict
from engine.output import lose_lines_and_no_more
from engine.paths import check_paths
from engine.resilience.elastic import fit_job, in_words
from engine.resilience.exit import STOPPED, crashes_leave_stacks, leave, refuse

if TYPE_CHECKING:
    from engine.record import Callback
    from engine.trainer import Trainer


def main(arguments: list[str]) -> int:
    """Run a training job on this rank; the exit status."""
    if not arguments or arguments[0].startswith("-"):
        return _help(arguments)
    crashes_leave_stacks()
    try:
        require(sys.platform == "linux", f"training needs Linux: {sys.platform} lacks its signals, locks and clocks")
        job = read_job(arguments[0], arguments[1:])
        came = working = int(os.environ.get("WORLD_SIZE", "1"))
        if job.config.parallel.elastic:
            job, fit = fit_job(job, came)
            job, working = replace(job, origin=(*job.origin, in_words(fit, came))), fit.ranks
        for phase in job.phases:
            with naming(phase.name, phase.own):
                check_layout(phase.config, working)
                check_vocabulary(phase.config)
        check_paths(job)
    except (ConfigError, DataError) as error:
        return refuse(error)
    return _train(job, working)


def _help(arguments: list[str]) -> int:
    """What is asked about the command and its settings; the exit status."""
    from engine.config.help.command import answer

    try:
        print(answer(arguments))
    except ConfigError as error:
        return refuse(error)
    return 0 if arguments else 2


def _train(job: Job, working: int) -> int:
    # Importing torch and megatron-core takes seconds: after the checks, so that a typing mistake answers at once.
    from engine.build import DTYPES
    from engine.checkpoint.format.errors import CheckpointError
    from engine.job import train_job
    from engine.parallel import launch
    from engine.parallel.mesh import LayoutError
    from engine.parallel.preflight import UnfitRank, preflight
    from engine.parallel.rendezvous import NotEveryoneCame
    from engine.parallel.standby import StoodBy
    from engine.resilience.agreement import RanksDiffer, facts_of
    from engine.resilience.failures import tell, tell_line
    from engine.resilience.judge import UnhealthyStep
    from engine.resilience.signals import Wishes, end_with_parent
    from engine.resilience.status import stopped_in_this_start
    from models.blocks.kernels import require_kernels
    from models.config import ModelConfigError

    config = job.config
    if stopped_in_this_start(Path(config.run_dir)):
        return STOPPED
    try:
        models = [(phase.config.model, DTYPES[phase.config.train.precision]) for phase in job.phases]
        kernels = dict.fromkeys(str(require_kernels(model, dtype)) for model, dtype in models)
    except ModelConfigError as error:
        return refuse(error)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    facts = facts_of(to_dict(config))
    ours = (ConfigError, LayoutError, NotEveryoneCame, RanksDiffer, UnfitRank)  # the first, of what a machine decides
    with Wishes() as wishes:  # until the last word is said
        try:
            with launch.job(config.parallel, facts, working) as (mesh, device):
                if mesh.world.rank == 0:
                    print("\n".join([*job.origin, "; then ".join(kernels)]), flush=True)
                if config.parallel.preflight:
                    preflight(mesh, device, Path(config.run_dir))
                done = train_job(job, mesh, device, partial(_callbacks, config), wishes)
        except StoodBy:
            return 0
        except (*ours, DataError, CheckpointError, ModelConfigError, UnhealthyStep) as error:
            return tell_line(error)
        except Exception as error:
            return tell(error, Path(config.run_dir))
    return 0 if done else STOPPED


def _callbacks(config: Config, trainer: "Trainer") -> list["Callback"]:
    """What watches a phase that is about to begin: the job's folder is taken, its checkpoint is loaded."""
    from engine.callbacks.checkpoint import CheckpointCallback
    from engine.callbacks.evaluation import Evaluation
    from engine.callbacks.json_log import JsonLog
    from engine.callbacks.speed import Speed
    from engine.callbacks.suite import SuiteEvaluation

    evaluation: list[Callback] = [JsonLog(trainer.mesh.world.rank)] if config.log.json else []
    if config.evaluate.every_steps:
        evaluation += [Evaluation(trainer)] if config.evaluate.shards else []
        evaluation += [SuiteEvaluation(trainer)] if config.evaluate.suite else []
    if trainer.mesh.world.rank != 0:
        return [*evaluation, CheckpointCallback(trainer)]
    return [*evaluation, Speed(trainer), *_logging_callbacks(config), CheckpointCallback(trainer)]


def _logging_callbacks(config: Config) -> list["Callback"]:
    """What world rank 0 alone has."""
    from engine.callbacks.console import ConsoleProgress
    from engine.callbacks.endpoint import MetricsEndpoint
    from engine.callbacks.history import History
    from engine.callbacks.metrics import MetricsFile
    from engine.callbacks.tensorboard import TensorBoard
    from engine.callbacks.wandb import WeightsAndBiases

    log = config.log
    callbacks: list[Callback] = [
        History(),
        MetricsFile(to_dict(config)),
        ConsoleProgress(log_every_steps=log.every_steps),
    ]
    callbacks += [TensorBoard()] if log.tensorboard else []
    callbacks += [WeightsAndBiases(log.wandb)] if log.wandb else []
    return [*callbacks, MetricsEndpoint(log.metrics_address, log.metrics_port)] if log.metrics_port else callbacks


if __name__ == "__main__":
    lose_lines_and_no_more()
    leave(main(sys.argv[1:]))
