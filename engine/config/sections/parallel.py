"""Section parallel: how the job is cut over its ranks."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.config.errors import MOST_MINUTES, MOST_STEPS, require, require_within
from models.sizes import Limits

if TYPE_CHECKING:
    from engine.config.schema import Config


LINK_BLOCKS = 1
"""Thread blocks of a message between stages: 0.9 % of an A100's SMs. One moves some 20 GB/s, what a card of 200 Gb/s
reaches: 79 MB in 4 ms beside a unit of 90 ms (derived; no GPU has run it). No setting: who makes the groups
(engine/parallel/device.py) and who prices them (tools/cost) ask here.
"""


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
    reduce_dtype: str = "fp32"
    """Gradients on their way between data-parallel ranks: fp32 | bf16 (half the bytes; added up in fp32, and not the
    same to the bit: off by at most 2^-8 of what other ranks put in)."""
    bucket_size: int | None = None
    """Elements of one bucket of gradients; null: megatron-core's choice (at least 40 million, a million a rank), but at
    most an eighth of a tower that is larger."""
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
    layout uses stand by (docs/lost_nodes.md)."""
    timeout_minutes: float = 30.0
    """A collective that waits longer for another rank ends the job; longer than the slowest load of a checkpoint."""


_LIMITS: Limits = {
    "tensor": (1, 1 << 20),
    "pipeline": (1, 1 << 20),
    "virtual": (1, 1 << 10),
    "round_size": (1, MOST_STEPS),
    "shard_ranks": (1, 1 << 20),
    "bucket_size": (1, 10**11),
    "start_timeout_minutes": (0, MOST_MINUTES),
    "hang_minutes": (0, MOST_MINUTES),
    "timeout_minutes": (1e-3, MOST_MINUTES),
}


def check_parallel(config: "Config") -> None:
    """Raise ConfigError for what cannot be run."""
    require_within("parallel", config.parallel, _LIMITS)
    tensor, vision = config.parallel.tensor, config.model.vision
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
    require(
        parallel.round_size is None or (parallel.round_size >= parallel.pipeline and parallel.virtual > 1),
        f"parallel.round_size {parallel.round_size} needs parallel.virtual > 1 and at least as many micro-batches as "
        f"parallel.pipeline {parallel.pipeline}",
    )
    require(
        parallel.reduce_dtype in ("fp32", "bf16"),
        f"parallel.reduce_dtype is {parallel.reduce_dtype!r}: choose fp32 or bf16",
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
