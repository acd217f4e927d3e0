"""Section train: the batch and the step."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from engine.config.errors import MOST_STEPS, ConfigError, require, require_within
from engine.config.sections.distill import TeacherConfig, check_distill
from models.config import ModelConfigError
from models.kernel_checks import check_kernels
from models.sizes import Limits
from models.tensors.kept import LEVELS

if TYPE_CHECKING:
    from engine.config.schema import Config


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
    fc2+proj+qkv | all (fc1, too); the same losses to the bit, memory for time (docs/kept_outputs.md)."""
    outputs_budget_gb: float | None = None
    """Instead of keep_outputs: each chunk of each rank keeps as many kinds of them as fit into this much memory."""
    offload_outputs: bool = False
    """Kept outputs wait for the replay in (pinned) host memory instead of the device's."""
    patch_dropout: float = 0.5
    """Share of patches dropped from each image (paper, section 3: 0.5 for most of training)."""
    freeze: list[str] = field(default_factory=list)
    """Tensors that are not trained, by patterns over their names in checkpoints, such as [vision.*, text.blocks.0-5.*]:
    without gradient buffer and optimizer state, and without replay and backward below all that is trained.
    """
    seed: int = 0
    """Initial values, sample order, crops and kept patches all follow from it."""
    precision: str = "fp32"
    """fp32 | bf16 (weights and activations in bf16; master weights, gradients, loss and optimizer in fp32). A CPU
    without bf16 instructions multiplies in fp32 and rounds the product.
    """
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
    distill: list[TeacherConfig] = field(default_factory=list)
    """Frozen CLIPs whose embeddings the student learns beside train.loss (docs/distillation.md)."""
    loss_variant: str = "gather"
    """gather (every rank gathers the embeddings) | ring (blocks travel round, O(B D / ranks) memory)."""
    loss_tile: int | None = None
    """Largest side of a tile of the logit matrix, in rows; null: chosen for the device."""

    @property
    def asked_outputs(self) -> str:
        """The option that asks for kept outputs, as it is written; empty: none does."""
        if self.outputs_budget_gb is not None:
            return f"train.outputs_budget_gb={self.outputs_budget_gb}"
        return f"train.keep_outputs={self.keep_outputs}" if self.keep_outputs != "none" else ""


_LIMITS: Limits = {
    "steps": (1, MOST_STEPS),
    "global_batch_size": (1, MOST_STEPS),
    "micro_batch_size": (1, MOST_STEPS),
    "text_micro_batch_size": (0, MOST_STEPS),
    "activation_budget_gb": (0, 1e6),
    "outputs_budget_gb": (0, 1e6),
    "logit_scale": (-1e6, 1e6),
    "loss_tile": (1, MOST_STEPS),
    "matryoshka": (1, 1 << 17),
}


def check_train(config: "Config") -> None:
    """Raise ConfigError for what cannot be run."""
    require_within("train", config.train, _LIMITS)
    _check_numbers(config.train)
    _check_kernels(config)
    _check_offload(config)
    _check_outputs(config)
    _check_matryoshka(config.train.matryoshka, config.model.embed_dim)
    check_distill(config)


def _check_numbers(train: TrainConfig) -> None:
    require(0 <= train.patch_dropout < 1, f"train.patch_dropout is {train.patch_dropout}: it must be in [0, 1)")
    require(train.precision in ("fp32", "bf16"), f"train.precision is {train.precision!r}: choose fp32 or bf16")
    require(
        train.keep_activations >= -1, "train.keep_activations must be -1 (all), 0 (none) or a number of micro-batches"
    )
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
        train.activation_budget_gb is None or train.keep_activations == 0,
        "train.activation_budget_gb replaces train.keep_activations: give one of them",
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


def _check_kernels(config: "Config") -> None:
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


def _check_offload(config: "Config") -> None:
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


def _check_outputs(config: "Config") -> None:
    train, model = config.train, config.model
    level, budget = train.keep_outputs, train.outputs_budget_gb
    require(level in LEVELS, f"train.keep_outputs is {level!r}: choose one of {', '.join(LEVELS)}")
    require(
        budget is None or level == "none",
        f"train.outputs_budget_gb {budget} replaces train.keep_outputs {level}: give one of them",
    )
    asked = train.asked_outputs
    if not asked:
        require(
            not train.offload_outputs,
            "train.offload_outputs has nothing to move: set train.keep_outputs or train.outputs_budget_gb",
        )
        return
    fp8 = "" if model.fp8 == "none" else " and model.fp8=none"
    require(
        model.backend != "transformer_engine",
        f"{asked} needs model.backend=local, not transformer_engine, whose linears quantise and multiply in one call "
        f"and cannot answer with a kept output: set model.backend=local{fp8}, or leave {asked.split('=')[0]} out",
    )
    require(
        train.recompute == "full" or train.keep_activations != -1,
        f"{asked} has nothing to keep with train.keep_activations=-1 and train.recompute={train.recompute}: no product "
        f"is repeated: set train.keep_activations=0, or leave {asked.split('=')[0]} out",
    )


def _check_matryoshka(widths: list[int], embed_dim: int) -> None:
    rises = all(earlier < later for earlier, later in pairwise([0, *widths]))
    require(
        not widths or (rises and widths[-1] == embed_dim),
        f"train.matryoshka is {widths}: give rising widths, the last the model's embed_dim {embed_dim}",
    )
