"""Checks of the sections of a config, each alone and with the others, that need no process group.

Beside them: what an objective needs (engine/objectives), what goes on around the steps (run_checks.py), the ranks
(layout.py). What they accept works together.
"""

from itertools import pairwise
from typing import Any

from data.errors import DataError
from engine.config.errors import ConfigError, require
from engine.config.schema import (
    CheckpointConfig,
    Config,
    InitConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from models.config import ModelConfigError
from models.kernel_checks import check_kernels
from models.tensors.kept import LEVELS


def changed_settings(section: Any, names: list[str]) -> list[str]:
    """Those of a section's settings that differ from their defaults."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def check(config: Config) -> None:
    """Raise ConfigError for the first thing that cannot be run."""
    try:
        config.model.check()
    except ModelConfigError as error:
        raise ConfigError(str(error)) from None
    _check_run_dir(config.run_dir)
    _check_data(config)
    _check_parallel(config)
    _check_train(config.train)
    _check_kernels(config)
    _check_offload(config)
    _check_outputs(config)
    _check_matryoshka(config.train.matryoshka, config.model.embed_dim)
    _check_optim(config.optim)
    _check_checkpoint(config.checkpoint)
    _check_init(config.init)


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


def _check_parallel(config: Config) -> None:
    tensor, pipeline, vision = config.parallel.tensor, config.parallel.pipeline, config.model.vision
    require(tensor >= 1 and pipeline >= 1, f"parallel.tensor {tensor} and parallel.pipeline {pipeline} must be >= 1")
    require(
        vision.heads % tensor == 0,
        f"parallel.tensor {tensor} does not divide the {vision.heads} attention heads of the vision tower",
    )
    require(
        vision.mlp_hidden % tensor == 0,
        f"parallel.tensor {tensor} does not divide the MLP width {vision.mlp_hidden} of the vision tower",
    )
    _check_stages(config.parallel, vision.depth)
    if config.parallel.sequence and tensor > 1:
        tokens = vision.kept_tokens(config.train.patch_dropout)
        packed = tokens * config.train.micro_batch_size
        require(
            packed % tensor == 0,
            f"parallel.sequence splits train.micro_batch_size {config.train.micro_batch_size} x {tokens} tokens = "
            f"{packed} over parallel.tensor {tensor}: make the micro-batch a multiple of {tensor} or set "
            "parallel.sequence=false",
        )


def _check_stages(parallel: ParallelConfig, depth: int) -> None:
    stages = parallel.pipeline * parallel.virtual
    require(parallel.virtual >= 1, f"parallel.virtual is {parallel.virtual}: it must be at least 1")
    require(
        parallel.round_size is None or (parallel.round_size >= parallel.pipeline and parallel.virtual > 1),
        f"parallel.round_size {parallel.round_size} needs parallel.virtual > 1 and at least as many micro-batches as "
        f"parallel.pipeline {parallel.pipeline}",
    )
    require(
        parallel.shard in ("optimizer", "gradients", "weights"),
        f"parallel.shard is {parallel.shard!r}: choose optimizer, gradients or weights",
    )
    require(
        parallel.shard_ranks is None or (parallel.shard == "weights" and parallel.shard_ranks >= 1),
        f"parallel.shard_ranks {parallel.shard_ranks} needs parallel.shard=weights, not {parallel.shard}, and at least "
        "1: it says which ranks gather weights",
    )
    require(
        stages <= depth,
        f"parallel.pipeline {parallel.pipeline} x parallel.virtual {parallel.virtual} = {stages} exceeds the {depth} "
        "blocks of the vision tower",
    )
    given = parallel.layers
    counts = isinstance(given, list) and all(type(count) is int for count in given)
    require(
        counts or given is None or given == "balanced",
        f"parallel.layers is {given!r}: give a list of the blocks of each stage, balanced (by cost) or null (even)",
    )
    if counts:
        require(
            len(given) == stages and sum(given) == depth and min(given) >= 1,
            f"parallel.layers {given} must give each of the {stages} stages at least one of the {depth} blocks "
            f"(it gives {sum(given)} to {len(given)})",
        )
    require(parallel.bucket_size is None or parallel.bucket_size >= 1, "parallel.bucket_size must be at least 1")
    for name in ("hang_minutes", "start_timeout_minutes"):
        require(getattr(parallel, name) >= 0, f"parallel.{name} is {getattr(parallel, name)}: 0 or more")
    require(parallel.timeout_minutes > 0, f"parallel.timeout_minutes is {parallel.timeout_minutes}: more than 0")


def _check_train(train: TrainConfig) -> None:
    require(train.steps >= 1, f"train.steps is {train.steps}: it must be at least 1")
    require(0 <= train.patch_dropout < 1, f"train.patch_dropout is {train.patch_dropout}: it must be in [0, 1)")
    require(train.precision in ("fp32", "bf16"), f"train.precision is {train.precision!r}: choose fp32 or bf16")
    require(train.micro_batch_size >= 1, f"train.micro_batch_size is {train.micro_batch_size}: at least 1")
    require(train.text_micro_batch_size >= 0, "train.text_micro_batch_size must be 0 (all at once) or more")
    require(
        train.keep_activations >= -1, "train.keep_activations must be -1 (all), 0 (none) or a number of micro-batches"
    )
    require(train.loss_tile is None or train.loss_tile >= 1, f"train.loss_tile is {train.loss_tile}: at least 1")
    require(train.loss in ("softmax", "sigmoid"), f"train.loss is {train.loss!r}: choose softmax or sigmoid")
    require(
        train.mask_false_negatives in ("none", "captions", "images", "both"),
        f"train.mask_false_negatives is {train.mask_false_negatives!r}: none, captions, images or both",
    )
    require(train.loss_variant in ("gather", "ring"), f"train.loss_variant is {train.loss_variant!r}: gather or ring")
    require(
        train.recompute in ("none", "selective", "full"),
        f"train.recompute is {train.recompute!r}: choose none, selective or full",
    )
    require(
        train.activation_budget_gb is None or (train.activation_budget_gb >= 0 and train.keep_activations == 0),
        "train.activation_budget_gb replaces train.keep_activations: give one of them, and not a negative budget",
    )
    require(
        train.logit_scale is None or train.logit_scale > 0,
        f"train.logit_scale is {train.logit_scale}: a positive number, or null to learn it",
    )
    require(
        train.logit_scale is None or train.logit_scale >= 1,
        f"train.logit_scale is {train.logit_scale}, which looks like a temperature: the scale is its inverse, "
        f"{1 / (train.logit_scale or 1):.4g}",
    )


def _check_kernels(config: Config) -> None:
    train, parallel, tensor = config.train, config.parallel, config.parallel.tensor
    # An evaluation between steps runs on the same kernels and keeps all patches.
    dropouts = [train.patch_dropout, *([0.0] if config.evaluate.every_steps else [])]
    try:
        for dropout in dropouts:
            check_kernels(
                config.model,
                precision=train.precision,
                packed_tokens=train.micro_batch_size * config.model.vision.kept_tokens(dropout),
                tensor=tensor,
                sequence_parallel=parallel.sequence and tensor > 1,
            )
    except ModelConfigError as error:
        raise ConfigError(str(error)) from None


def _check_offload(config: Config) -> None:
    train, chunks = config.train, config.parallel.pipeline * config.parallel.virtual
    require(
        not train.offload_stash or chunks > 1,
        "train.offload_stash needs parallel.pipeline or parallel.virtual > 1: the first chunk stashes nothing, "
        "its images are on the host anyway",
    )
    require(
        not train.offload_stash or train.keep_activations != -1,
        "train.offload_stash has nothing to move with train.keep_activations=-1: no micro-batch is stashed",
    )


def _check_outputs(config: Config) -> None:
    train, model = config.train, config.model
    level, budget = train.keep_outputs, train.outputs_budget_gb
    require(level in LEVELS, f"train.keep_outputs is {level!r}: choose one of {', '.join(LEVELS)}")
    require(
        budget is None or (budget >= 0 and level == "none"),
        f"train.outputs_budget_gb {budget} replaces train.keep_outputs {level}: give one of them, and not a negative "
        "budget",
    )
    if level == "none" and budget is None:
        require(
            not train.offload_outputs,
            "train.offload_outputs has nothing to move: set train.keep_outputs or train.outputs_budget_gb",
        )
        return
    asked = f"train.keep_outputs={level}" if budget is None else f"train.outputs_budget_gb={budget}"
    require(
        model.backend != "transformer_engine",
        f"{asked} needs model.backend=local: Transformer Engine's linears quantise and multiply in one call and cannot "
        "answer with a kept output",
    )
    require(
        train.recompute == "full" or train.keep_activations != -1,
        f"{asked} has nothing to keep with train.keep_activations=-1 and train.recompute={train.recompute}: no product "
        "is repeated",
    )


def _check_matryoshka(widths: list[int], embed_dim: int) -> None:
    rises = all(earlier < later for earlier, later in pairwise([0, *widths]))
    require(
        not widths or (rises and widths[-1] == embed_dim),
        f"train.matryoshka is {widths}: give rising widths, the last the model's embed_dim {embed_dim}",
    )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    require(checkpoint.every_steps >= 0, "checkpoint.every_steps must be 0 (never) or more")
    require(checkpoint.keep_last >= 1, "checkpoint.keep_last must be at least 1")
    every, kept = checkpoint.every_steps, checkpoint.keep_every_steps
    require(
        kept >= 0 and (kept == 0 or (every > 0 and kept % every == 0)),
        f"checkpoint.keep_every_steps is {kept}: 0, or a multiple of checkpoint.every_steps {every}",
    )
    local = checkpoint.local_every_steps
    require(
        local == 0 or 0 < local < every,
        f"checkpoint.local_every_steps is {local}: 0 (never), or fewer than checkpoint.every_steps {every}, whose "
        "checkpoints outlive the loss of two hosts",
    )
    require(
        local == 0 or checkpoint.resume == "auto",
        f"checkpoint.local_every_steps {local} is for runs that go on by themselves: checkpoint.resume=auto, not "
        f"{checkpoint.resume}",
    )
    require(
        checkpoint.local_dir.startswith("/"),
        f"checkpoint.local_dir is {checkpoint.local_dir!r}: a whole path, the same on every host",
    )
    require(
        local > 0 or checkpoint.local_dir == CheckpointConfig().local_dir,
        f"checkpoint.local_dir {checkpoint.local_dir} has no effect without checkpoint.local_every_steps",
    )
    partial = [key for key in ("skip", "reinit") if getattr(checkpoint, key)]
    require(
        not partial or checkpoint.resume not in ("auto", "none"),
        f"checkpoint.{partial[0] if partial else ''} needs checkpoint.resume=PATH: a run takes its own checkpoints "
        "whole",
    )
    require(
        checkpoint.on_full in ("stop", "skip", "wait"),
        f"checkpoint.on_full is {checkpoint.on_full!r}: choose stop, skip or wait",
    )
    require(
        checkpoint.keep_best_is in ("min", "max"),
        f"checkpoint.keep_best_is is {checkpoint.keep_best_is!r}: choose min or max",
    )


def _check_init(init: InitConfig) -> None:
    loads = init.vision or init.text or init.logit_scale
    idle = [key for key in ("skip", "reinit", "resize_patch") if getattr(init, key) and not loads]
    key = idle[0] if idle else ""
    require(not idle, f"init.{key} has no effect without init.vision, init.text or init.logit_scale")


def _check_optim(optim: OptimConfig) -> None:
    require(optim.name in ("lamb", "adamw"), f"optim.name is {optim.name!r}: choose lamb or adamw")
    require(optim.mode in ("paper", "nvlamb"), f"optim.mode is {optim.mode!r}: choose paper or nvlamb")
    require(len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas), f"optim.betas {optim.betas}: two in [0, 1)")
    require(
        not optim.nvlamb_always_adapt or (optim.name == "lamb" and optim.mode == "nvlamb"),
        f"optim.nvlamb_always_adapt needs optim.name=lamb and optim.mode=nvlamb, not {optim.name} and {optim.mode} "
        "(mode paper always adapts)",
    )
    require(0 < optim.trust_min <= optim.trust_max, "optim.trust_min must be positive and at most optim.trust_max")
    for name in ("layer_decay_vision", "layer_decay_text"):
        value = getattr(optim, name)
        require(0 < value <= 1, f"optim.{name} is {value}: it must be in (0, 1]")
    for name in ("lr_vision", "lr_text", "lr_other", "weight_decay", "warmup_steps", "min_lr_ratio", "clip_grad_norm"):
        value = getattr(optim, name)
        require(value >= 0, f"optim.{name} is {value}: it must not be negative")
