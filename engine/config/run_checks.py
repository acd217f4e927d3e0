"""Checks of what goes on around the steps of a run: health, averaged weights, evaluation, logs."""

from importlib.util import find_spec

from engine.config.errors import require
from engine.config.schema import Config, EvaluateConfig, HealthConfig, LogConfig
from engine.objectives.registry import objective_of

_ACTIONS = ("stop", "skip", "rewind")
_WILDCARDS = ("", "*", "0", "0.0.0.0", "::", "::0", "0:0:0:0:0:0:0:0")


def check_run(config: Config) -> None:
    """Raise ConfigError for the first thing that cannot be run."""
    _check_health(config.health, checkpoints=config.checkpoint.every_steps > 0)
    decay = config.optim.ema_decay
    require(0 <= decay < 1, f"optim.ema_decay is {decay}: it must be in [0, 1); 0 keeps no average")
    if config.evaluate.every_steps:
        _check_evaluate(config)
    else:
        _refuse_idle(config.evaluate)
    _check_best(config)
    _check_log(config.log)


def _check_log(log: LogConfig) -> None:
    require(log.every_steps >= 1, "log.every_steps must be at least 1")
    require(0 <= log.metrics_port < 65536, f"log.metrics_port is {log.metrics_port}: 0 (none) to 65535")
    require(
        log.metrics_address.strip("[]") not in _WILDCARDS,
        f"log.metrics_address {log.metrics_address!r} would listen on every interface: name the address of one",
    )
    require(
        log.metrics_port > 0 or log.metrics_address == LogConfig().metrics_address,
        f"log.metrics_address {log.metrics_address} has no effect without log.metrics_port",
    )
    require(
        not log.wandb or find_spec("wandb") is not None,
        f"log.wandb={log.wandb} needs the package wandb: pip install 'eva-megatron[wandb]'",
    )


def _check_health(health: HealthConfig, *, checkpoints: bool) -> None:
    require(
        health.on_nonfinite in _ACTIONS,
        f"health.on_nonfinite is {health.on_nonfinite!r}: choose one of {', '.join(_ACTIONS)}",
    )
    require(
        health.on_divergence in ("stop", "repair", "rewind"),
        f"health.on_divergence is {health.on_divergence!r}: choose stop, repair or rewind",
    )
    require(health.audit_every_steps >= 0, f"health.audit_every_steps is {health.audit_every_steps}: 0 (never) or more")
    require(
        health.on_spike in ("off", *_ACTIONS),
        f"health.on_spike is {health.on_spike!r}: choose one of off, {', '.join(_ACTIONS)}",
    )
    factors = {"loss_factor": health.loss_factor, "gradient_factor": health.gradient_factor}
    for name, factor in factors.items():
        require(factor == 0 or factor > 1, f"health.{name} is {factor}: it must be above 1, or 0 (not watched)")
    require(
        (health.on_spike == "off") == (not any(factors.values())),
        f"health.on_spike is {health.on_spike} with the factors {factors}: set both, what to do and what is a spike",
    )
    require(health.window_steps >= 1, f"health.window_steps is {health.window_steps}: it must be at least 1")
    for name in ("max_skips", "max_rewinds"):
        value = getattr(health, name)
        require(value >= 1, f"health.{name} is {value}: it must be at least 1")
    require(
        checkpoints or "rewind" not in (health.on_nonfinite, health.on_spike, health.on_divergence),
        "health rewinds to the last checkpoint: set checkpoint.every_steps above 0",
    )


def _check_evaluate(config: Config) -> None:
    evaluate = config.evaluate
    require(objective_of(config).reads_captions, "evaluate is zero-shot: it needs captions, so objective=contrastive")
    require(evaluate.every_steps >= 1, "evaluate.every_steps must be 0 (never) or more")
    require(
        bool(evaluate.shards or evaluate.suite),
        "evaluate.every_steps is set, but evaluate.shards is empty: give held-out shards, or evaluate.suite",
    )
    require(
        bool(evaluate.suite) == bool(evaluate.data),
        f"evaluate.suite {evaluate.suite!r} and evaluate.data {evaluate.data!r} go together: the suite and its folder",
    )
    require(
        bool(evaluate.shards) or not (evaluate.classes or evaluate.max_samples),
        "evaluate.classes and evaluate.max_samples are about evaluate.shards, which is empty",
    )
    require(evaluate.max_samples >= 0, "evaluate.max_samples must be 0 (all) or more")
    require(
        bool(evaluate.templates) and all("{}" in template for template in evaluate.templates),
        f"evaluate.templates {evaluate.templates}: each needs {{}} in the place of the class name",
    )
    require(
        bool(evaluate.classes) or evaluate.templates == ["{}"],
        "evaluate.templates needs evaluate.classes: without it, captions are compared as they are",
    )
    require(not evaluate.ema or config.optim.ema_decay > 0, "evaluate.ema needs averaged weights: set optim.ema_decay")


def _refuse_idle(evaluate: EvaluateConfig) -> None:
    idle = [key for key in ("shards", "classes", "max_samples", "ema", "suite", "data") if getattr(evaluate, key)]
    require(not idle, f"evaluate.{idle[0] if idle else ''} has no effect without evaluate.every_steps")


def _check_best(config: Config) -> None:
    """keep_best needs checkpoints, a number that this job measures at each of them, and its better end."""
    best, every, saved = config.checkpoint.keep_best, config.evaluate.every_steps, config.checkpoint.every_steps
    require(saved > 0 or not best, f"checkpoint.keep_best {best} has no effect without checkpoint.every_steps")
    missing = objective_of(config).unmeasured(config)
    require(
        best not in missing,
        f"checkpoint.keep_best is {best}, which this job does not measure ({missing.get(best)})",
    )
    require(
        config.checkpoint.keep_best_is == "max" or not _is_accuracy(best),
        f"checkpoint.keep_best is {best}, where more is better: set checkpoint.keep_best_is=max",
    )
    require(
        not best.startswith("eval_") or (every > 0 and saved % every == 0),
        f"checkpoint.keep_best is {best}, but evaluate.every_steps {every} does not divide checkpoint.every_steps "
        f"{saved}: there would be checkpoints without it",
    )


def _is_accuracy(metric: str) -> bool:
    ends = ("top1", "top5", "recall_at_1", "recall_at_5")
    return metric in ("i2t_top1", "t2i_top1") or (metric.startswith("eval_") and metric.endswith(ends))
