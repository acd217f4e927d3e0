"""A job and its phases: each a whole config, resolved and checked at the start (docs/phases.md).

Steps and samples are counted over the whole job. A phase has its own data order, which begins at the phase's sample 0;
crops and dropped patches follow the position in the whole job.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from engine.config.checks import check, check_run
from engine.config.errors import ConfigError, require
from engine.config.schema import Config, PhaseConfig
from engine.config.stages import balanced_layers
from engine.config.tree import whole_model
from engine.config.typed import built, merged
from engine.objectives.registry import objective_of
from models.config import LOCAL_KERNELS, ModelConfig, ModelConfigError

_SECTIONS = ("model", "data", "train", "optim")
_KEY = re.compile(rf"\b(?:{'|'.join(_SECTIONS)})(?:\.[a-z0-9_]+)+")
"""A setting as messages name it."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a job, resolved."""

    config: Config
    """The settings of this phase alone: no phases in it; train.steps is the phase's length."""
    name: str
    """The phase's name; empty for a job without phases."""
    first_step: int
    """Steps of the job before it."""
    last_step: int
    """Steps of the job when it ends."""
    first_sample: int
    """Position in the job of the phase's sample 0."""
    schedule_first_step: int
    """Step of the job at which its warm-up and cosine began."""
    schedule_steps: int
    """Steps of that warm-up and cosine, over all phases that share them."""
    total_steps: int
    """Steps of the whole job."""
    reset_optimizer: bool
    """Whether the optimizer's moments start at 0."""
    own: tuple[str, ...] = ()
    """Settings that the phase itself gives; it has the others from the job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, read and checked once: nothing in it changes any more."""

    config: Config
    """What run_dir/config.yaml holds; train.steps counts the steps of all phases."""
    phases: tuple[Phase, ...]
    """All phases in order, each with a complete config; one without a name for a job that has none."""
    origin: tuple[str, ...] = ()
    """Where the settings come from, in lines for people."""

    def phase(self, name: str = "") -> Phase:
        """The phase of this name; empty: the first. Raises ConfigError that lists the names."""
        names = [phase.name for phase in self.phases]
        require(
            not name or name in names, f"phase {name!r} is not one of the config's: {', '.join(names) or 'it has none'}"
        )
        return self.phases[names.index(name) if name else 0]


def plan_job(config: Config, *, given_steps: int | None = None, origin: Sequence[str] = ()) -> Job:
    """The job of a config, with every phase checked. Raises ConfigError for the first thing that cannot be run.

    given_steps: train.steps as somebody wrote it; None: the phases alone say how long they are.
    """
    if not config.phases:
        config = _settled(config)
        steps = config.train.steps
        phase = _phase(config, "", 0, 0, schedule=(0, steps), total_steps=steps, reset_optimizer=False)
        return Job(config=config, phases=(phase,), origin=tuple(origin))
    configs = [_resolved(config, phase) for phase in config.phases]
    _check_together(config, configs)
    settled = [_settled_phase(phase, own) for phase, own in zip(config.phases, configs, strict=True)]
    phases = _in_order(config.phases, settled)
    total = phases[-1].total_steps
    require(
        given_steps in (None, total),
        f"train.steps is {given_steps}, but the phases add up to {total} steps: leave train.steps out",
    )
    whole = replace(config, train=replace(config.train, steps=total))
    return Job(config=whole, phases=phases, origin=tuple(origin))


def first_phase(config: Config) -> Phase:
    """The first phase of a config that a program made: all of it, where it has no phases. Raises ConfigError."""
    return plan_job(config).phases[0]


def _in_order(phases: Sequence[PhaseConfig], configs: Sequence[Config]) -> tuple[Phase, ...]:
    lengths = [config.train.steps for config in configs]
    first_step, first_sample, plan = 0, 0, []
    for i, (phase, own) in enumerate(zip(phases, configs, strict=True)):
        plan.append(
            _phase(
                own,
                phase.name,
                first_step,
                first_sample,
                schedule=_schedule(phases, lengths, i),
                total_steps=sum(lengths),
                reset_optimizer=phase.optimizer == "reset",
                own=_own(phase),
            )
        )
        first_step += own.train.steps
        first_sample += own.train.steps * own.train.global_batch_size
    return tuple(plan)


def _phase(
    config: Config,
    name: str,
    first_step: int,
    first_sample: int,
    *,
    schedule: tuple[int, int],
    total_steps: int,
    reset_optimizer: bool,
    own: tuple[str, ...] = (),
) -> Phase:
    return Phase(
        config=config,
        name=name,
        first_step=first_step,
        last_step=first_step + config.train.steps,
        first_sample=first_sample,
        schedule_first_step=schedule[0],
        schedule_steps=schedule[1],
        total_steps=total_steps,
        reset_optimizer=reset_optimizer,
        own=own,
    )


def _settled(config: Config) -> Config:
    """The config, checked, with the list that parallel.layers=balanced stands for: config.yaml says what a run does."""
    check(config)
    objective_of(config).check(config)
    check_run(config)
    parallel, model = config.parallel, config.model
    if parallel.layers != "balanced":
        return config
    tokens = model.vision.kept_tokens(config.train.patch_dropout)
    layers = balanced_layers(model, stages=parallel.pipeline, virtual=parallel.virtual, tokens=tokens)
    return replace(config, parallel=replace(parallel, layers=layers))


def _settled_phase(phase: PhaseConfig, config: Config) -> Config:
    with naming(phase.name, _own(phase)):
        return _settled(config)


def _own(phase: PhaseConfig) -> tuple[str, ...]:
    """The settings that the phase itself gives."""
    return tuple(f"{section}.{key}" for section in _SECTIONS for key in getattr(phase, section))


@contextmanager
def naming(phase: str, own: Sequence[str]) -> Iterator[None]:
    """What is refused in the block names the phase, and which of the values it has from the job. phase: empty for none.

    own: settings that the phase itself gives.
    """
    try:
        yield
    except (ConfigError, ModelConfigError) as error:
        if not phase:
            raise
        named = dict.fromkeys(_KEY.findall(str(error)))
        inherited = [key for key in named if not any(key == k or key.startswith(f"{k}.") for k in own)]
        told = f" (from the job, not set by the phase: {', '.join(inherited)})" if inherited else ""
        raise ConfigError(f"phase {phase!r}: {error}{told}") from None


def _schedule(phases: Sequence[PhaseConfig], lengths: Sequence[int], i: int) -> tuple[int, int]:
    """(first step of the job, steps) of the warm-up and cosine that phase i is part of."""
    begins = [j == 0 or phase.schedule == "restart" for j, phase in enumerate(phases)]
    first = max(j for j in range(i + 1) if begins[j])
    after = next((j for j in range(i + 1, len(phases)) if begins[j]), len(phases))
    return sum(lengths[:first]), sum(lengths[first:after])


def _resolved(job: Config, phase: PhaseConfig) -> Config:
    where = f"phase {phase.name!r}"
    require(phase.optimizer in ("keep", "reset"), f"{where}: optimizer is {phase.optimizer!r}: choose keep or reset")
    require(
        phase.schedule in ("continue", "restart"),
        f"{where}: schedule is {phase.schedule!r}: choose continue or restart",
    )
    fixed = [key for key in ("steps", "seed") if key in phase.train]
    require(
        not fixed,
        f"{where} sets train.{fixed[0] if fixed else ''}: a phase's length is its own steps or samples, the seed is "
        "that of the job",
    )
    tree: dict[str, Any] = dataclasses.asdict(job) | {"phases": []}
    if "shards" in phase.data:
        tree["data"] |= {"sources": [], "mixture_schedule": []}
    if "sources" in phase.data:
        tree["data"] |= {"shards": [], "mixture_schedule": []}
    own = {section: getattr(phase, section) for section in _SECTIONS}
    preset = phase.model.get("preset")
    if preset is not None:  # another model as a whole, on the job's kernels
        kernels = {key: tree["model"][key] for key in LOCAL_KERNELS}
        tree["model"], own["model"] = kernels, whole_model(phase.model)
    config = built(Config, merged(tree, own))
    return replace(config, train=replace(config.train, steps=_length(phase, config.train.global_batch_size)))


def _length(phase: PhaseConfig, global_batch_size: int) -> int:
    given = (phase.steps > 0) + (phase.samples > 0)
    require(
        given == 1 and min(phase.steps, phase.samples) >= 0,
        f"phase {phase.name!r} has steps {phase.steps} and samples {phase.samples}: give one of them, above 0",
    )
    return phase.steps or math.ceil(phase.samples / max(1, global_batch_size))


def _check_together(job: Config, configs: list[Config]) -> None:
    names = [phase.name for phase in job.phases]
    require(all(names) and len(set(names)) == len(names), f"phases have the names {names}: each needs one of its own")
    require(
        len(names) == 1 or job.checkpoint.every_steps > 0,
        "phases go on from the checkpoint at their border: set checkpoint.every_steps above 0",
    )
    for i in range(1, len(configs)):
        _check_border(job.phases[i], configs[i - 1], configs[i])


def _check_border(phase: PhaseConfig, before: Config, after: Config) -> None:
    where = f"phase {phase.name!r}"
    require(
        _without_resolution(before.model) == _without_resolution(after.model),
        f"{where} changes the model beyond its resolution (model.vision.image_size): start another job from this one's "
        "checkpoint with init.vision and init.text",
    )
    for key, learned in (("train.logit_scale", _learns_scale), ("train.loss", _learns_bias)):
        require(
            learned(before) == learned(after),
            f"{where} changes {key} so that the model has other learned scalars: keep it over all phases",
        )
    for key in ("warmup_steps", "min_lr_ratio") if phase.schedule == "continue" else ():
        one, other = getattr(before.optim, key), getattr(after.optim, key)
        require(
            one == other,
            f"{where} continues the schedule of the phase before, but sets optim.{key} {other} instead of {one}: set "
            "schedule: restart, or leave it out",
        )


def _without_resolution(model: ModelConfig) -> ModelConfig:
    return replace(model, preset=None, backend="", vision=replace(model.vision, image_size=0))


def _learns_scale(config: Config) -> bool:
    return config.train.logit_scale is None


def _learns_bias(config: Config) -> bool:
    return config.train.loss == "sigmoid"
