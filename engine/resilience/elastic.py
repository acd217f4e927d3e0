"""A job on fewer ranks than its recipe names: the same batches, cut otherwise, so the same curve.

DP must divide the global batch, so most numbers of ranks admit no layout of a recipe as it stands. What may change
without changing the result is how a replica works through its part: micro-batch (never larger, for the memory's sake),
captions at once, micro-batches of a round, micro-batches that keep their activations. Ranks that no layout uses stand
by (engine/parallel/standby.py). Imports no torch: the planner and the start of every rank ask before anything is built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.config.checks import check
from engine.config.errors import ConfigError
from engine.config.layout import check_layout
from engine.config.phases import Job, Phase
from engine.config.schema import Config

SMALLEST = 0.5
"""Share of the recipe's micro-batch below which a number of ranks is passed over: devices would wait for launches."""


@dataclass(frozen=True)
class Fit:
    """How many of the ranks work, and with which settings."""

    ranks: int
    """Ranks that work; the others stand by."""
    changed: dict[str, Any]
    """Dotted settings that are not the recipe's, of a job without phases; of all its phases together otherwise."""
    configs: tuple[Config, ...]
    """Settings of the phases, in order."""


def fit_job(job: Job, ranks: int) -> tuple[Job, Fit]:
    """The job as it runs on the most of `ranks` ranks that a layout uses. Raises ConfigError where none does."""
    fit = most_ranks([phase.config for phase in job.phases], ranks)
    phases = tuple(replace(phase, config=config) for phase, config in zip(job.phases, fit.configs, strict=True))
    return replace(job, config=_whole(job, phases), phases=phases), fit


def most_ranks(configs: Sequence[Config], ranks: int) -> Fit:
    """The largest number of ranks, up to `ranks`, that all phases can be laid out on. Raises ConfigError."""
    replica = configs[0].parallel.tensor * configs[0].parallel.pipeline
    for used in range(ranks // replica * replica, 0, -replica):
        fitted = [fitting(config, used) for config in configs]
        if None not in fitted:
            found = tuple(config for config in fitted if config is not None)
            changed = [_changes(one, other) for one, other in zip(configs, found, strict=True)]
            return Fit(used, {key: value for part in changed for key, value in part.items()}, found)
    raise ConfigError(
        f"no number of ranks up to {ranks} that is a multiple of parallel.tensor x parallel.pipeline = {replica} fits "
        f"train.global_batch_size {configs[0].train.global_batch_size} with micro-batches of at least "
        f"{SMALLEST:.0%} of train.micro_batch_size {configs[0].train.micro_batch_size}"
    )


def in_words(fit: Fit, came: int) -> str:
    """What a start on `came` ranks comes to, in a line."""
    settings = ", ".join(f"{key}={value}" for key, value in fit.changed.items())
    said = f"elastic: {fit.ranks} of {came} ranks work with {settings or 'the settings as they are'}"
    return said + (f", {came - fit.ranks} stand by" if came > fit.ranks else "")


def fitting(config: Config, ranks: int) -> Config | None:
    """The config for exactly so many ranks, as it is if it fits; None where no allowed change makes it fit."""
    data, left = divmod(ranks, config.parallel.tensor * config.parallel.pipeline)
    if left or not data or config.train.global_batch_size % data:
        return None
    for candidate in _candidates(config, config.train.global_batch_size // data):
        try:
            check(candidate)
            check_layout(candidate, ranks)
        except ConfigError:
            continue
        return candidate
    return None


def _candidates(config: Config, local: int) -> Iterator[Config]:
    """The config itself, then with smaller micro-batches, each with rounds that divide its number of micro-batches.

    local: samples of a replica.
    """
    yield config
    train, frames = config.train, config.data.frames
    images = local * frames
    for micro in range(train.micro_batch_size, 0, -frames):
        if images % micro or micro < SMALLEST * train.micro_batch_size:
            continue
        count = images // micro
        smaller = replace(train, micro_batch_size=micro, keep_activations=min(train.keep_activations, count))
        for round_size in (config.parallel.round_size, _round(config, count)):
            yield replace(config, train=smaller, parallel=replace(config.parallel, round_size=round_size))


def _round(config: Config, micro_batches: int) -> int | None:
    """The smallest round that has work for every stage and divides the micro-batches; null where there are none, and
    where weights or gradients are sharded, which makes all of them one round.
    """
    stages, wanted = config.parallel.pipeline, config.parallel.round_size or 0
    if config.parallel.virtual == 1 or config.parallel.shard != "optimizer":
        return None
    sizes = [size for size in range(max(stages, wanted), micro_batches + 1) if micro_batches % size == 0]
    return sizes[0] if sizes else None


def _changes(recipe: Config, fitted: Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": getattr(getattr(fitted, section), name)
        for section, name in (
            ("train", "micro_batch_size"),
            ("train", "keep_activations"),
            ("parallel", "round_size"),
        )
        if getattr(getattr(fitted, section), name) != getattr(getattr(recipe, section), name)
    }


def _whole(job: Job, phases: tuple[Phase, ...]) -> Config:
    """What run_dir/config.yaml holds: the settings in force, of a job without phases."""
    if job.config.phases:
        return job.config
    return replace(job.config, train=phases[0].config.train, parallel=phases[0].config.parallel)
