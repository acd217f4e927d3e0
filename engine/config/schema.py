"""The settings of a training job as a typed tree: one dataclass a section, a docstring under each field."""

from dataclasses import dataclass, field
from typing import Any

from data.config import DataConfig
from engine.config.typed import Unbounded
from models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
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
    round_size: int | None = None
    """G: micro-batches that a chunk works in a row before the next chunk's turn, where virtual > 1; null: as many as
    pipeline, or all of the replica's where shard is not optimizer."""
    shard: str = "optimizer"
    """What the data-parallel ranks share: optimizer (its state) | gradients (also the fp32 gradients, whole during
    a chunk's backward only) | weights (also the weights, gathered for a chunk's turn); the same losses to the bit."""
    shard_ranks: int | None = None
    """Neighbouring data-parallel ranks, with shard=weights, (of one node) that gather weights among themselves at every
    turn, each holding 1 / shard_ranks of them; null: all data-parallel ranks."""
    layers: Any = field(default=None, metadata={"given": list[int] | str | None})
    """Blocks of each stage (of each of the pipeline x virtual chunks, in tower order): a list; null: even; balanced: by
    FLOPs, patch embedding and projection counted (it is a list once the config is resolved)."""
    overlap: bool = True
    """Reduce gradients during the last backward and gather weights during the next encode, bucket by bucket."""
    bucket_size: int | None = None
    """Elements of one bucket of gradients; null: megatron-core's choice (at least 40 million)."""
    start_timeout_minutes: float = 10.0
    """A start whose ranks have not all come by then ends with the names of those that are missing."""
    hang_minutes: float = 10.0
    """A job in which nothing moves for so long names who is late, leaves all stacks in run_dir/hang and ends; 0: never.
    """
    preflight: bool = False
    """Seconds before the first step in which every rank multiplies, copies, sums over its groups and writes: one with
    wrong numbers ends the start, a slow one is named."""
    elastic: bool = False
    """Fit micro-batch, kept activations and round_size to the ranks that came, where the recipe's do not; ranks that no
    layout uses stand by (docs/reliability.md)."""
    timeout_minutes: float = 30.0
    """A collective that waits longer for another rank ends the job; longer than the slowest load of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One phase of contrastive training."""

    steps: int = 1000
    """Optimizer steps in all."""
    global_batch_size: int = 256
    """B, pairs of one optimizer step over all ranks."""
    micro_batch_size: int = 64
    """Images of one pass through a vision stage; each of the data.frames of a clip is one."""
    text_micro_batch_size: int = 0
    """Captions of one pass through the text tower; 0: all captions of the rank at once."""
    keep_activations: int = 0
    """The last k micro-batches of the encode phase keep their activations and are not replayed; -1 keeps all."""
    activation_budget_gb: float | None = None
    """Instead of keep_activations: each rank keeps as many micro-batches as fit into this much memory."""
    recompute: str = "none"
    """Inside a vision stage: none | selective (core attention) | full (every layer), where one does not fit."""
    offload_stash: bool = False
    """Stage inputs wait for the replay in (pinned) host memory instead of the device's."""
    keep_outputs: str = "none"
    """Outputs of the blocks' products that a replay takes instead of multiplying again: none | fc2 | fc2+proj |
    fc2+proj+qkv | all (fc1, too); the same losses to the bit, memory for time (docs/contrastive_step.md)."""
    outputs_budget_gb: float | None = None
    """Instead of keep_outputs: each chunk of each rank keeps as many kinds of them as fit into this much memory."""
    offload_outputs: bool = False
    """Kept outputs wait for the replay in (pinned) host memory instead of the device's."""
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
    mask_false_negatives: str = "none"
    """none | captions | images | both: pairs of the global batch with the same caption (as far as the context reaches),
    or the same picture file, are no negatives of each other.
    """
    matryoshka: list[int] = field(default_factory=list)
    """Widths of nested embeddings, such as [256, 768, 1024], the last embed_dim: the mean of the losses of the first so
    many numbers, each L2-normalised anew; empty trains the whole embedding alone.
    """
    loss_variant: str = "gather"
    """gather (every rank gathers the embeddings) | ring (blocks travel round, O(B D / ranks) memory)."""
    loss_tile: int | None = None
    """Largest side of a tile of the logit matrix, in rows; null: chosen for the device."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """LAMB or AdamW with layer decay (paper, Tables 12 and 13)."""

    name: str = "lamb"
    """lamb | adamw."""
    mode: str = "paper"
    """LAMB variant: paper (DeepSpeed's rule, per logical tensor, ratio within bounds) | nvlamb (bias-corrected update,
    unbounded ratio, only where weight decay applies unless nvlamb_always_adapt)."""
    lr_vision: float = 4e-4
    """Base rate of the image tower; layer decay and schedule multiply it."""
    lr_text: float = 4e-5
    """Base rate of the text tower."""
    lr_other: float = 5e-4
    """Base rate of the learned logit scale (the authors' --lr)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the mean and of the mean square of the gradients."""
    eps: float = 1e-6
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Not applied to tensors of one dimension, biases, class token and position tables."""
    layer_decay_vision: float = 0.9
    """Factor on the rate of each block of the image tower towards the input; 1: none."""
    layer_decay_text: float = 0.75
    """Factor on the rate of each block of the text tower towards the input; 1: none."""
    warmup_steps: int = 2000
    """Steps over which the rates rise from 0; the cosine follows."""
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of each base rate."""
    clip_grad_norm: float = 5.0
    """Global norm over every tensor of both towers; 0 does not clip."""
    ema_decay: float = 0.0
    """Keeps an exponential moving average of the weights, a <- decay a + (1 - decay) w a step; 0 keeps none."""
    trust_min: float = 0.01
    """Smallest trust ratio of LAMB's mode paper."""
    trust_max: float = field(default=10.0, metadata={"given": Unbounded})
    """Largest trust ratio of LAMB's mode paper; inf: no bound."""
    trust_exclude_1d: bool = False
    """Ratio 1 for tensors of one dimension (not the paper's setting)."""
    nvlamb_always_adapt: bool = False
    """Mode nvlamb applies its ratio to every tensor, also where no weight decay applies (always_adapt of the authors'
    class); at the paper's weight decay of 0 the mode is Adam without it."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to go on from (docs/checkpoints.md)."""

    every_steps: int = 0
    """0: never (also not at the end)."""
    async_save: bool = True
    """Write in the background; training waits for the copy to host memory only (checkpoint_stall_s of the metrics)."""
    local_every_steps: int = 0
    """Also save every n steps on the hosts themselves, with a copy on the next one, for a start at the same layout; 0:
    never."""
    local_dir: str = "/dev/shm"
    """Where on each host: memory, or a disk of its own."""
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
    on_full: str = "stop"
    """A checkpoint that cannot be written, for want of space for example: stop | skip (try again when the next one is
    due) | wait (until there is room)."""
    skip: list[str] = field(default_factory=list)
    """Patterns of tensors of the checkpoint that are not loaded (`logit_scale.*`); everything else must fit."""
    reinit: list[str] = field(default_factory=list)
    """Patterns of tensors of the model that start afresh."""
    accept: list[str] = field(default_factory=list)
    """Settings that may differ from those of the checkpoint although they change the result (`optim.lr_*`)."""


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One part of a job with settings of its own (docs/phases.md)."""

    name: str = ""
    """Name of the phase in the metrics, the log and the checkpoints."""
    samples: int = 0
    """Length in samples, rounded up to whole steps."""
    steps: int = 0
    """Length in steps, instead of samples."""
    optimizer: str = "keep"
    """keep (the moments go on) | reset (they start at 0). Weights go on in both cases."""
    schedule: str = "continue"
    """continue (one warm-up and cosine with the phase before) | restart (one of its own)."""
    model: dict[str, Any] = field(default_factory=dict, metadata={"given": ModelConfig})
    """Only another resolution: a preset, or vision.image_size."""
    data: dict[str, Any] = field(default_factory=dict, metadata={"given": DataConfig})
    """Settings that replace those of the job's `data`."""
    train: dict[str, Any] = field(default_factory=dict, metadata={"given": TrainConfig})
    """The same for `train`; steps and seed are the job's."""
    optim: dict[str, Any] = field(default_factory=dict, metadata={"given": OptimConfig})
    """The same for `optim`."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What happens to a step that went wrong (docs/phases.md)."""

    on_nonfinite: str = "stop"
    """A loss or gradient norm that is not finite: stop | skip (no update) | rewind (weights of the last checkpoint)."""
    on_spike: str = "off"
    """A spike: off | stop | skip | rewind."""
    on_divergence: str = "stop"
    """Copies of weights that differ: stop | repair (owners send theirs again, no update) | rewind."""
    audit_every_steps: int = 10
    """Copies of weights are compared every n steps and before every checkpoint; 0: never."""
    loss_factor: float = 0.0
    """A loss above this many times the median of the last window_steps good ones is a spike; 0: not watched."""
    gradient_factor: float = 0.0
    """The same for the gradient norm before clipping."""
    window_steps: int = 100
    """Good steps that the medians are taken over; before there are so many, nothing is a spike."""
    max_skips: int = 10
    """So many skipped steps in a row are borne; one more stops the run."""
    max_rewinds: int = 3
    """So many rewinds in the whole run are borne; one more stops it."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Zero-shot evaluation between steps, on shards that training does not see, or on a suite of sets."""

    every_steps: int = 0
    """0: never. Otherwise also after the last step of every phase."""
    shards: list[str] = field(default_factory=list)
    """As data.shards."""
    classes: str = ""
    """Text file, one class name a line; a sample's caption is its class. Empty: every caption is a candidate."""
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Prompts of a class; {} stands for its name."""
    max_samples: int = 0
    """The first n samples only; 0: all."""
    ema: bool = False
    """Evaluate the averaged weights (optim.ema_decay)."""
    suite: str = ""
    """A suite of sets (docs/evaluation.md): paper, datacomp, video, quick or FILE.yaml; besides shards or instead."""
    data: str = ""
    """The folder that holds the sets of the suite."""


@dataclass(frozen=True, kw_only=True)
class MimConfig:
    """Masked-feature distillation (objective: mim, docs/mim.md): who teaches, and what the student does not see."""

    teacher: str | None = None
    """A CLIP whose vision tower teaches: checkpoint or run folder, or a file in the authors' layout."""
    teacher_model: ModelConfig | None = None
    """Model of the teacher (a preset's name, or a mapping); null: what its checkpoint says. A file does not say it."""
    teacher_precision: str | None = None
    """fp32 | bf16; null: train.precision."""
    masked_patches: int = 105
    """Patches of an image to mask (EVA: 105 of 256); some masks end short."""
    min_block: int = 16
    """Smallest area of a masked rectangle, in patches."""
    max_block: int | None = None
    """Most patches that one rectangle may add; null: what is left to mask."""
    min_aspect: float = 0.3
    """Aspect ratios of rectangles lie between this and its inverse."""
    patch_gradient_scale: float = 1.0
    """Factor on the gradient of the patch projection (0.1: stop_grad_conv1 of the EVA-02 recipes)."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the callbacks write."""

    every_steps: int = 10
    """Lines on a console that is not a terminal."""
    tensorboard: bool = True
    """Whether run_dir/tensorboard is written."""
    json: bool = False
    """Whether every rank writes what it says, and rank 0 every step, to run_dir/log, a JSON object a line."""
    metrics_port: int = 0
    """Port at which the first rank serves its last step to Prometheus (/metrics); 0: none."""
    metrics_address: str = "127.0.0.1"
    """The address that is listened on for it: this host's own, or one that is named; no wildcard."""
    wandb: str = ""
    """Project of Weights & Biases that gets every step (needs the package wandb); empty: none."""
    timeline_steps: list[int] = field(default_factory=list)
    """Steps (0-based) whose spans are written to run_dir/timeline; draw them with python -m tools.timeline."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training job."""

    run_dir: str = "runs/default"
    """Everything the job writes."""
    objective: str = "contrastive"
    """contrastive (CLIP) | mim (the image tower learns a teacher's features of masked patches)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mim: MimConfig = field(default_factory=MimConfig)
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of the job, one after the other; the sections above hold what a phase does not change."""
    health: HealthConfig = field(default_factory=HealthConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def micro_batch_samples(self) -> int:
        """Samples of one micro-batch: every frame of a clip counts as an image of it."""
        return self.train.micro_batch_size // self.data.frames
