"""The training config: a typed tree, YAML plus dotted overrides, and every check that needs no process group.

Order of precedence: defaults < model preset < config file < `dotted.key=value` arguments. `load_config` returns the
resolved tree; what it accepts works together or is refused here, before any process group exists.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig
from data.errors import DataError
from data.tokenizer import VOCAB_SIZE
from models.config import ModelConfig, ModelConfigError

PRESETS = Path(__file__).resolve().parent.parent / "models" / "presets"


class ConfigError(Exception):
    """A config that cannot be run; the message names the key, its value and the fix."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the vision tower is cut; DP is what is left of the ranks."""

    tensor: int = 1
    """TP: ranks that share each layer."""
    pipeline: int = 1
    """PP: stages of consecutive layers."""
    sequence: bool = True
    """Sequence parallelism on packed tokens; takes effect where tensor > 1."""
    virtual: int = 1
    """v: chunks of layers a rank holds (interleaved schedule); shortens the bubble where pipeline > 1."""
    layers: list[int] | None = None
    """Blocks of each stage (of each of the pipeline x virtual chunks, in tower order); null: even."""
    overlap: bool = True
    """Reduce gradients during the last backward and gather weights during the next encode, bucket by bucket."""
    bucket_size: int | None = None
    """Elements of one bucket of gradients; null: megatron-core's choice (at least 40 million)."""


@dataclass(kw_only=True)
class TrainConfig:
    """One phase of contrastive training."""

    steps: int = 1000
    """Optimizer steps in all."""
    global_batch_size: int = 256
    """B, pairs of one optimizer step over all ranks."""
    micro_batch_size: int = 64
    """Images of one pass through a vision stage."""
    text_micro_batch_size: int = 0
    """Captions of one pass through the text tower; 0: all captions of the rank at once."""
    keep_activations: int = 0
    """The last k micro-batches of the encode phase keep their activations and are not replayed; -1 keeps all."""
    activation_budget_gb: float | None = None
    """Instead of keep_activations: each rank keeps as many micro-batches as fit into this much memory."""
    recompute: str = "none"
    """Inside a vision stage: none | selective (core attention) | full (every layer), where one does not fit."""
    patch_dropout: float = 0.5
    """Share of patches dropped from each image (paper, section 3: 0.5 for most of training)."""
    seed: int = 0
    """Initial values, sample order, crops and kept patches all follow from it."""
    precision: str = "fp32"
    """fp32 | bf16 (weights and activations in bf16; master weights, gradients, loss and optimizer in fp32)."""
    logit_scale: float | None = 100.0
    """Fixed scale 1 / temperature (paper, section 3: temperature 0.01); null learns it from 1 / 0.07, at most 100."""
    loss: str = "softmax"
    """softmax (the paper's) | sigmoid (SigLIP, with a learned bias)."""
    loss_variant: str = "gather"
    """gather (every rank gathers the embeddings) | ring (blocks travel round, O(B D / ranks) memory)."""
    loss_tile: int | None = None
    """Largest side of a tile of the logit matrix, in rows; null: chosen for the device."""


@dataclass(kw_only=True)
class OptimConfig:
    """LAMB or AdamW with layer decay (paper, Tables 12 and 13)."""

    name: str = "lamb"
    """lamb | adamw."""
    mode: str = "paper"
    """LAMB variant: paper (DeepSpeed's rule, per logical tensor, ratio within bounds) | nvlamb (bias-corrected update,
    unbounded ratio, only where weight decay applies unless nvlamb_always_adapt)."""
    lr_vision: float = 4e-4
    lr_text: float = 4e-5
    lr_other: float = 5e-4
    """Learned logit scale (the authors' --lr)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-6
    weight_decay: float = 0.0
    """Not applied to tensors of one dimension, biases, class token and position tables."""
    layer_decay_vision: float = 0.9
    layer_decay_text: float = 0.75
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of each base rate."""
    clip_grad_norm: float = 5.0
    """Global norm over every tensor of both towers; 0 does not clip."""
    trust_min: float = 0.01
    trust_max: float = 10.0
    trust_exclude_1d: bool = False
    """Ratio 1 for tensors of one dimension (not the paper's setting)."""
    nvlamb_always_adapt: bool = False
    """Mode nvlamb applies its ratio to every tensor, also where no weight decay applies (always_adapt of the authors'
    class); at the paper's weight decay of 0 the mode is Adam without it."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save, and what to go on from (docs/checkpoints.md)."""

    every_steps: int = 0
    """0: never (also not at the end)."""
    async_save: bool = True
    """Write in the background; training waits for the copy to host memory only (checkpoint_stall_s of the metrics)."""
    keep_last: int = 2
    """Older checkpoints are deleted, unless one of the next two keeps them."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step stay; 0: none for this reason."""
    keep_best: str = ""
    """Metric of the step record whose best checkpoint stays ("loss"); empty: none for this reason."""
    keep_best_is: str = "min"
    """min | max."""
    resume: str = "auto"
    """auto (the newest good one of run_dir, if any) | none | path of a checkpoint or run folder; any layout."""
    verify_hashes: bool = True
    """Check the hash of every file before loading (each by one rank); false: sizes only."""
    skip: list[str] = field(default_factory=list)
    """Patterns of tensors of the checkpoint that are not loaded (`logit_scale.*`); everything else must fit."""
    reinit: list[str] = field(default_factory=list)
    """Patterns of tensors of the model that start afresh."""


@dataclass(kw_only=True)
class InitConfig:
    """Weights that a fresh run starts from; a checkpoint of its own comes first (checkpoint.resume)."""

    vision: str | None = None
    """Checkpoint or run folder, or a file in the authors' layout: its vision tower (a MIM student's too)."""
    text: str | None = None
    """The same for the text tower."""
    logit_scale: str | None = None
    """The same for the learned logit scale."""
    skip: list[str] = field(default_factory=list)
    """Patterns of their tensors that are not loaded."""
    reinit: list[str] = field(default_factory=list)
    """Patterns of tensors that start afresh (`vision.head.projection.*`, `text.projection.weight`)."""
    resize_patch: bool = False
    """Interpolate a patch kernel of another size; positions are interpolated anyway."""


@dataclass(kw_only=True)
class LogConfig:
    """What the callbacks write."""

    every_steps: int = 10
    """Lines on a console that is not a terminal."""
    tensorboard: bool = True
    timeline_steps: list[int] = field(default_factory=list)
    """Steps (0-based) whose spans are written to run_dir/timeline; draw them with python -m tools.timeline."""


@dataclass(kw_only=True)
class Config:
    """A training job."""

    run_dir: str = "runs/default"
    """Everything the job writes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    log: LogConfig = field(default_factory=LogConfig)


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
    given = OmegaConf.merge(_expand_shorthand(tree), *(_parse_override(o) for o in overrides))
    preset = OmegaConf.select(given, "model.preset")
    layers = [OmegaConf.structured(Config)]
    if preset is not None:
        layers.append(OmegaConf.create({"model": load_preset(str(preset))}))
    try:
        config = OmegaConf.to_object(OmegaConf.merge(*layers, given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None
    assert isinstance(config, Config)
    _check(config)
    return config


def load_preset(name: str) -> dict[str, Any]:
    """Contents of models/presets/NAME.yaml."""
    file = PRESETS / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"model {name!r} is not a preset; there are: {known}")
    return yaml.safe_load(file.read_text())


def preset_model(name: str) -> ModelConfig:
    """The model of a preset, checked."""
    return resolve({"model": name, "data": {"shards": ["-"]}}, []).model


def to_dict(config: Config) -> dict[str, Any]:
    """Plain mapping of the resolved tree, as run_dir/config.yaml and checkpoints hold it."""
    return dataclasses.asdict(config)


def _expand_shorthand(tree: dict[str, Any]) -> dict[str, Any]:
    """`model: NAME` stands for `model: {preset: NAME}`, a shard string for a list of one (in a source, too)."""
    tree = dict(tree)
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}
    data = tree.get("data")
    if isinstance(data, dict):
        tree["data"] = _list_of_one(data)
        if isinstance(data.get("sources"), list):
            tree["data"]["sources"] = [_list_of_one(source) for source in data["sources"]]
    return tree


def _list_of_one(source: Any) -> Any:
    if isinstance(source, dict) and isinstance(source.get("shards"), str):
        return {**source, "shards": [source["shards"]]}
    return source


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
    return _expand_shorthand(parsed)


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as a string; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), None)
    return lines[0] if key is None or key in lines[0] else f"{key}: {lines[0]}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check(config: Config) -> None:
    try:
        config.model.check()
    except ModelConfigError as error:
        raise ConfigError(str(error)) from None
    _check_data(config)
    _check_parallel(config)
    _check_train(config.train)
    _check_optim(config.optim)
    _check_checkpoint(config.checkpoint)
    _check_init(config.init)
    _require(config.log.every_steps >= 1, "log.every_steps must be at least 1")


def _check_data(config: Config) -> None:
    try:
        config.data.check()
    except DataError as error:
        raise ConfigError(str(error)) from None
    batch = config.train.global_batch_size
    for switch in config.data.mixture_schedule:
        _require(
            config.data.mix != "one_per_batch" or switch.at_samples % batch == 0,
            f"data.mixture_schedule switches at {switch.at_samples} samples, within a batch of train.global_batch_size "
            f"{batch} that data.mix=one_per_batch takes from one source: use a multiple of {batch}",
        )


def _check_parallel(config: Config) -> None:
    tensor, pipeline, vision = config.parallel.tensor, config.parallel.pipeline, config.model.vision
    _require(tensor >= 1 and pipeline >= 1, f"parallel.tensor {tensor} and parallel.pipeline {pipeline} must be >= 1")
    _require(
        vision.heads % tensor == 0,
        f"parallel.tensor {tensor} does not divide the {vision.heads} attention heads of the vision tower",
    )
    _require(
        vision.mlp_hidden % tensor == 0,
        f"parallel.tensor {tensor} does not divide the MLP width {vision.mlp_hidden} of the vision tower",
    )
    _check_stages(config.parallel, vision.depth)
    if config.parallel.sequence and tensor > 1:
        tokens = vision.kept_tokens(config.train.patch_dropout)
        packed = tokens * config.train.micro_batch_size
        _require(
            packed % tensor == 0,
            f"parallel.sequence splits train.micro_batch_size {config.train.micro_batch_size} x {tokens} tokens = "
            f"{packed} over parallel.tensor {tensor}: make the micro-batch a multiple of {tensor} or set "
            "parallel.sequence=false",
        )


def _check_stages(parallel: ParallelConfig, depth: int) -> None:
    stages = parallel.pipeline * parallel.virtual
    _require(parallel.virtual >= 1, f"parallel.virtual is {parallel.virtual}: it must be at least 1")
    _require(
        parallel.virtual == 1 or parallel.pipeline > 1,
        f"parallel.virtual {parallel.virtual} needs parallel.pipeline > 1: one stage has no bubble to shorten",
    )
    _require(
        stages <= depth,
        f"parallel.pipeline {parallel.pipeline} x parallel.virtual {parallel.virtual} = {stages} exceeds the {depth} "
        "blocks of the vision tower",
    )
    if parallel.layers is not None:
        given = parallel.layers
        _require(
            len(given) == stages and sum(given) == depth and min(given) >= 1,
            f"parallel.layers {given} must give each of the {stages} stages at least one of the {depth} blocks "
            f"(it gives {sum(given)} to {len(given)})",
        )
    _require(parallel.bucket_size is None or parallel.bucket_size >= 1, "parallel.bucket_size must be at least 1")


def _check_train(train: TrainConfig) -> None:
    _require(train.steps >= 1, f"train.steps is {train.steps}: it must be at least 1")
    _require(0 <= train.patch_dropout < 1, f"train.patch_dropout is {train.patch_dropout}: it must be in [0, 1)")
    _require(train.precision in ("fp32", "bf16"), f"train.precision is {train.precision!r}: choose fp32 or bf16")
    _require(train.micro_batch_size >= 1, f"train.micro_batch_size is {train.micro_batch_size}: at least 1")
    _require(train.text_micro_batch_size >= 0, "train.text_micro_batch_size must be 0 (all at once) or more")
    _require(
        train.keep_activations >= -1, "train.keep_activations must be -1 (all), 0 (none) or a number of micro-batches"
    )
    _require(train.loss_tile is None or train.loss_tile >= 1, f"train.loss_tile is {train.loss_tile}: at least 1")
    _require(train.loss in ("softmax", "sigmoid"), f"train.loss is {train.loss!r}: choose softmax or sigmoid")
    _require(train.loss_variant in ("gather", "ring"), f"train.loss_variant is {train.loss_variant!r}: gather or ring")
    _require(
        train.recompute in ("none", "selective", "full"),
        f"train.recompute is {train.recompute!r}: choose none, selective or full",
    )
    _require(
        train.activation_budget_gb is None or (train.activation_budget_gb >= 0 and train.keep_activations == 0),
        "train.activation_budget_gb replaces train.keep_activations: give one of them, and not a negative budget",
    )
    _require(
        train.logit_scale is None or train.logit_scale > 0,
        f"train.logit_scale is {train.logit_scale}: a positive number, or null to learn it",
    )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    _require(checkpoint.every_steps >= 0, "checkpoint.every_steps must be 0 (never) or more")
    _require(checkpoint.keep_last >= 1, "checkpoint.keep_last must be at least 1")
    every, kept = checkpoint.every_steps, checkpoint.keep_every_steps
    _require(
        kept >= 0 and (kept == 0 or (every > 0 and kept % every == 0)),
        f"checkpoint.keep_every_steps is {kept}: 0, or a multiple of checkpoint.every_steps {every}",
    )
    partial = [key for key in ("skip", "reinit") if getattr(checkpoint, key)]
    _require(
        not partial or checkpoint.resume not in ("auto", "none"),
        f"checkpoint.{partial[0] if partial else ''} needs checkpoint.resume=PATH: a run takes its own checkpoints "
        "whole",
    )
    _require(
        checkpoint.keep_best_is in ("min", "max"),
        f"checkpoint.keep_best_is is {checkpoint.keep_best_is!r}: choose min or max",
    )


def _check_init(init: InitConfig) -> None:
    loads = init.vision or init.text or init.logit_scale
    idle = [key for key in ("skip", "reinit", "resize_patch") if getattr(init, key) and not loads]
    key = idle[0] if idle else ""
    _require(not idle, f"init.{key} has no effect without init.vision, init.text or init.logit_scale")


def _check_optim(optim: OptimConfig) -> None:
    _require(optim.name in ("lamb", "adamw"), f"optim.name is {optim.name!r}: choose lamb or adamw")
    _require(optim.mode in ("paper", "nvlamb"), f"optim.mode is {optim.mode!r}: choose paper or nvlamb")
    _require(
        len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas), f"optim.betas {optim.betas}: two in [0, 1)"
    )
    _require(
        not optim.nvlamb_always_adapt or (optim.name == "lamb" and optim.mode == "nvlamb"),
        f"optim.nvlamb_always_adapt needs optim.name=lamb and optim.mode=nvlamb, not {optim.name} and {optim.mode} "
        "(mode paper always adapts)",
    )
    _require(0 < optim.trust_min <= optim.trust_max, "optim.trust_min must be positive and at most optim.trust_max")
    for name in ("layer_decay_vision", "layer_decay_text"):
        value = getattr(optim, name)
        _require(0 < value <= 1, f"optim.{name} is {value}: it must be in (0, 1]")
    for name in ("lr_vision", "lr_text", "lr_other", "weight_decay", "warmup_steps", "min_lr_ratio", "clip_grad_norm"):
        value = getattr(optim, name)
        _require(value >= 0, f"optim.{name} is {value}: it must not be negative")


def check_layout(config: Config, world_size: int) -> int:
    """DP for this number of ranks, or ConfigError with every factor. Pure arithmetic: dry runs call it too."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    replica = tensor * pipeline
    _require(
        world_size % replica == 0,
        f"{world_size} ranks cannot be cut into replicas of parallel.tensor {tensor} x parallel.pipeline {pipeline} = "
        f"{replica} ranks: start a multiple of {replica} ranks",
    )
    data = world_size // replica
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    _require(
        batch % (data * micro) == 0,
        f"train.global_batch_size {batch} is not a multiple of DP {data} x train.micro_batch_size {micro} = "
        f"{data * micro} (TP {tensor} x PP {pipeline} x DP {data} = {world_size} ranks)",
    )
    keep, local = config.train.keep_activations, batch // (data * micro)
    _require(
        batch >= world_size,
        f"train.global_batch_size {batch} is smaller than the {world_size} ranks: each encodes captions of its own",
    )
    _require(
        config.parallel.virtual == 1 or local % pipeline == 0,
        f"parallel.virtual {config.parallel.virtual} works groups of parallel.pipeline {pipeline} micro-batches, but a "
        f"replica has {local}: change train.micro_batch_size or set parallel.virtual=1",
    )
    _require(
        keep <= local, f"train.keep_activations {keep} exceeds the {local} micro-batches of a replica (-1 keeps all)"
    )
    return data


def check_vocabulary(config: Config) -> None:
    """The tokenizer's ids must fit the token table, and the end-of-text id must be the highest (pooling)."""
    size = config.model.text.vocab_size
    _require(
        size == VOCAB_SIZE,
        f"model.text.vocab_size is {size}, but the tokenizer of captions has {VOCAB_SIZE} ids: set it to {VOCAB_SIZE}",
    )
