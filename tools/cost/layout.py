"""One way to lay a job out over GPUs, and what each pipeline stage then holds. Plain numbers, no torch."""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from engine.config.read import Config, HealthConfig, check_layout
from engine.config.sections.freeze import Frozen, frozen_parts
from engine.config.stages import even_layers, stage_layers
from models.config import ModelConfig, TextConfig, VisionConfig
from models.hashing import HashedOnce
from models.tensors.freezing import frozen_names
from models.tensors.inventory import elements, text_shapes, vision_shapes
from tools.cli import CommandError
from tools.cost.kernels import Kernels

BYTES = {"fp32": 4, "bf16": 2}
COPIES = {"none": (), "captions": ("captions",), "images": ("images",), "both": ("captions", "images")}
"""train.mask_false_negatives -> what pairs are told by."""


class PlanError(CommandError):
    """A job that cannot be planned; the message names the numbers and the fix."""


@dataclass(frozen=True)
class FrozenModel:
    """A teacher, and what it teaches; all but the features' distance goes over the whole batch."""

    model: ModelConfig
    precision: str
    interactive: bool
    relational: bool
    feature: bool = True


@dataclass(frozen=True, kw_only=True)
class Layout(HashedOnce):
    """The settings of a job that decide its memory, its traffic and its time (fields as in engine/config/sections)."""

    __hash__ = HashedOnce.__hash__

    tensor: int = 1
    """TP."""
    pipeline: int = 1
    """PP."""
    virtual: int = 1
    """v, chunks of blocks a rank holds."""
    data: int = 1
    """DP."""
    global_batch: int
    """B, pairs of a step."""
    micro_batch: int
    """M, images of one pass through a stage; a multiple of the frames."""
    frames: int = 1
    """Images of a pair: 1, or those of a clip."""
    keep: int = 0
    """k, micro-batches that keep their activations."""
    recompute: str = "none"
    """none | selective | full, inside a stage."""
    sequence: bool = True
    """Sequence parallelism; takes effect where tensor > 1."""
    text_micro_batch: int = 0
    """Captions of one pass; 0: all of the rank."""
    patch_dropout: float = 0.5
    precision: str = "bf16"
    overlap: bool = True
    """Gradients are reduced during the last backward, weights gathered during the first encode."""
    offload_stash: bool = False
    """Stage inputs wait in host memory for their replay."""
    keep_outputs: str = "none"
    """Outputs of products that a replay takes: a level of models/tensors/kept.py."""
    outputs_budget_gb: float | None = None
    """Instead: each chunk keeps as many kinds of them as fit into this much."""
    offload_outputs: bool = False
    """They wait in host memory."""
    shard: str = "optimizer"
    """optimizer | gradients | weights: what the data-parallel ranks share."""
    shard_ranks: int | None = None
    """Data-parallel ranks that gather sharded weights among themselves; None: all."""
    group_size: int | None = None
    """G, micro-batches that a chunk works in a row, where virtual > 1; None: P, or m where more than states is shared.
    """
    layers: tuple[int, ...] | None = None
    """Blocks of each chunk in tower order; None: even."""
    freeze: tuple[str, ...] = ()
    """Patterns of what is not trained. What is frozen above the lowest tensor of a tower that is trained counts as
    trained in the image tower: few do that."""
    kernels: Kernels = field(default_factory=Kernels)
    teachers: tuple[FrozenModel, ...] = ()
    """CLIPs of train.distill, whole on every rank."""
    reduce_dtype: str = "fp32"
    """Gradients on their way between data-parallel ranks."""
    optimizer: str = "lamb"
    """A name of engine/config/sections/optim.py."""
    averages: bool = False
    """Whether an average of the weights is kept (optim.ema_decay)."""
    loss: str = "softmax"
    """softmax | sigmoid."""
    loss_variant: str = "gather"
    """gather | ring: how a rank meets the rows of the others."""
    widths: tuple[int, ...] = ()
    """Widths of the embedding that each have a loss (train.matryoshka); none: the whole embedding's."""
    told_by: tuple[str, ...] = ()
    """captions, images: identifiers by which the loss tells false negatives (train.mask_false_negatives)."""
    loss_tile: int | None = None
    """Largest side of a tile of logits; None: the engine's on a GPU."""
    bucket_size: int | None = None
    """Elements of one bucket of gradients; None: the engine's choice."""
    audit_every_steps: int = HealthConfig.audit_every_steps
    """Steps from one look at copies of weights to the next; 0: nobody looks at what lies in memory."""
    features: bool = False
    """Whether embeddings of the images are read in the place of pixels (data.features): no image tower runs."""

    @property
    def replica(self) -> int:
        """Ranks that hold one copy of the vision tower."""
        return self.tensor * self.pipeline

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.replica * self.data

    @property
    def local_batch(self) -> int:
        """b, pairs of a replica."""
        return self.global_batch // self.data

    @property
    def micro_batches(self) -> int:
        """m of a replica."""
        return self.local_images // self.micro_batch

    @property
    def round_size(self) -> int:
        """G: micro-batches of one chunk's turn."""
        if self.virtual == 1 or self.shard != "optimizer":
            return self.micro_batches
        return min(self.group_size or self.pipeline, self.micro_batches)

    @property
    def keeps_outputs(self) -> bool:
        """Whether a replay finds outputs of products."""
        return self.keep_outputs != "none" or self.outputs_budget_gb is not None

    @property
    def copies(self) -> int:
        """Identifiers of a pair."""
        return len(self.told_by)

    @property
    def has_picture_ids(self) -> bool:
        """Whether the hash of a picture travels beside its caption."""
        return "images" in self.told_by

    @property
    def keeps_captions(self) -> bool:
        """Whether captions keep their activations: where every micro-batch does."""
        return self.keep >= self.micro_batches

    @property
    def passes_kept(self) -> int:
        """Passes of each chunk that leave outputs for one that repeats them."""
        return self.micro_batches if self.recompute == "full" else self.micro_batches - self.keep

    @property
    def gathering_ranks(self) -> int:
        """Data-parallel ranks that hold the weights once among them."""
        return self.data if self.shard == "weights" and self.shard_ranks is None else self.shard_ranks or 1

    @property
    def local_images(self) -> int:
        """Images of a replica."""
        return self.local_batch * self.frames

    @property
    def own_rows(self) -> int:
        """Captions, and rows of the loss, of the rank that has the most."""
        return -(-self.local_batch // self.replica)

    @property
    def captions_at_once(self) -> int:
        """Captions of one pass through the text tower."""
        return min(self.text_micro_batch or self.own_rows, self.own_rows)

    @property
    def caption_parts(self) -> int:
        """Passes through the text tower."""
        return -(-self.own_rows // self.captions_at_once)

    @property
    def deals_captions(self) -> bool:
        """Whether stages have captions before and behind their units (engine/objectives/contrastive/program.py)."""
        return self.pipeline > 2 and self.shard == "optimizer"

    @property
    def splits_tokens(self) -> bool:
        """Whether a tensor rank holds its share of the tokens only."""
        return self.sequence and self.tensor > 1

    @property
    def pooled_rows(self) -> int:
        """R, rows that the tower's last block answers with: as many on each tensor rank that splits tokens."""
        ranks = self.tensor if self.splits_tokens else 1
        return -(-self.micro_batch // ranks) * ranks

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of weights and activations."""
        return BYTES[self.precision]

    def loss_widths(self, model: ModelConfig) -> tuple[int, ...]:
        """Width of the rows of each loss of a step."""
        return self.widths or (model.embed_dim,)

    @property
    def reduced_bytes(self) -> int:
        """Bytes of a gradient on its way."""
        return BYTES[self.reduce_dtype]

    def packed_tokens(self, vision: VisionConfig) -> int:
        """T = M x S of one micro-batch."""
        return self.micro_batch * _kept_tokens(vision, self.patch_dropout)

    def message_bytes(self, vision: VisionConfig) -> int:
        """What a rank sends to the next stage for one micro-batch: its rows of the packed tokens."""
        rows = self.packed_tokens(vision) // (self.tensor if self.splits_tokens else 1)
        return rows * vision.width * self.element_bytes

    def __str__(self) -> str:
        virtual = f" (v {self.virtual})" if self.virtual > 1 else ""
        name = f"TP {self.tensor} × PP {self.pipeline}{virtual} × DP {self.data}"
        if self.shard == "optimizer":
            return name
        within = f" of {self.shard_ranks} ranks" if self.shard_ranks else ""
        return f"{name}, {self.shard} sharded{within}"


@lru_cache(maxsize=256)
def _kept_tokens(vision: VisionConfig, patch_dropout: float) -> int:
    return vision.kept_tokens(patch_dropout)


def layout_of(config: Config, ranks: int) -> Layout:
    """Layout of a config without phases. Raises ConfigError if it does not admit these ranks, PlanError for a memory
    budget, which only a rank can turn into micro-batches.
    """
    train, parallel = config.train, config.parallel
    if train.activation_budget_gb is not None:
        raise PlanError(
            f"train.activation_budget_gb={train.activation_budget_gb} becomes a number of micro-batches only on a "
            "rank, which measures one: set train.activation_budget_gb=null and train.keep_activations"
        )
    data = check_layout(config, ranks)
    micro_batches = train.global_batch_size // (data * config.micro_batch_samples)
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual,
        data=data,
        global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size,
        frames=config.data.frames,
        keep=micro_batches if train.keep_activations < 0 else train.keep_activations,
        recompute=train.recompute,
        sequence=parallel.sequence,
        text_micro_batch=train.text_micro_batch_size,
        patch_dropout=train.patch_dropout,
        precision=train.precision,
        overlap=parallel.overlap,
        offload_stash=train.offload_stash,
        keep_outputs=train.keep_outputs,
        outputs_budget_gb=train.outputs_budget_gb,
        offload_outputs=train.offload_outputs,
        shard=parallel.shard,
        shard_ranks=parallel.shard_ranks,
        group_size=parallel.round_size,
        layers=tuple(parallel.layers) if parallel.layers else None,
        freeze=tuple(train.freeze),
        kernels=kernels_of(config.model),
        teachers=tuple(
            FrozenModel(
                teacher.model,
                teacher.precision or train.precision,
                interactive=teacher.interactive > 0,
                relational=teacher.relational > 0,
                feature=teacher.feature > 0,
            )
            for teacher in train.distill
            if teacher.model is not None
        ),
        reduce_dtype=parallel.reduce_dtype,
        optimizer=config.optim.name,
        averages=config.optim.ema_decay > 0,
        loss=train.loss,
        loss_variant=train.loss_variant,
        widths=tuple(train.matryoshka),
        told_by=COPIES[train.mask_false_negatives],
        loss_tile=train.loss_tile,
        bucket_size=parallel.bucket_size,
        audit_every_steps=config.health.audit_every_steps,
        features=bool(config.data.features),
    )


def kernels_of(model: ModelConfig) -> Kernels:
    """What the settings of a model choose on a GPU (models/blocks/kernels.py)."""
    keeps_scores = model.attention == "matmul"
    if model.backend == "transformer_engine":
        return Kernels(elementwise="compiled", fp8=model.fp8 != "none", keeps_scores=keeps_scores)
    if model.block_kernels == "fused" or (model.block_kernels == "auto" and model.norm_kernel == "auto"):
        return Kernels(elementwise="fused", sums=True, keeps_scores=keeps_scores)
    elementwise = "compiled" if model.norm_kernel in ("compiled", "apex") else "eager"
    return Kernels(elementwise=elementwise, sums=True, keeps_scores=keeps_scores)


@dataclass(frozen=True, kw_only=True)
class Stage(HashedOnce):
    """What one pipeline rank holds of the vision tower."""

    __hash__ = HashedOnce.__hash__

    rank: int
    """Pipeline rank."""
    chunks: tuple[int, ...]
    """Blocks of each of its chunks, in tower order."""
    has_embedding: bool
    has_head: bool
    repeated: "Stage | None" = None
    """The part of it that is replayed and has a backward, as a stage; None: all of it."""
    inputs: int = -1
    """Chunks whose inputs wait for a replay; below 0: all but the one that takes images."""
    returned: int = -1
    """Chunks that send a gradient to the stage before them; below 0: all but the one that takes images."""
    reads_no_gradient: bool = False
    """Whether the lowest block with a backward is here, and its first product has an input without a gradient."""

    @property
    def above(self) -> "Stage":
        """The part with a backward."""
        return self if self.repeated is None else self.repeated

    @property
    def trains(self) -> bool:
        """Whether it has anything to do backward, itself being a part with a backward."""
        return self.blocks > 0 or self.has_head or self.has_embedding

    @property
    def stashed_inputs(self) -> int:
        """Chunks whose inputs wait for a replay."""
        return len(self.chunks) - self.has_embedding if self.inputs < 0 else self.inputs

    @property
    def returned_gradients(self) -> int:
        """Chunks that send a gradient to the stage before them."""
        return len(self.chunks) - self.has_embedding if self.returned < 0 else self.returned

    @cached_property
    def blocks(self) -> int:
        """Blocks of all chunks together."""
        return sum(self.chunks)

    @property
    def whole_blocks(self) -> int:
        """Those that compute every row: not the tower's last one (models/blocks/last_block.py)."""
        return self.blocks - self.last_blocks

    @property
    def last_blocks(self) -> int:
        """1 where the tower's last block is here; 0 too for a head alone."""
        return int(self.has_head and self.chunks[-1] > 0)


def stages_of(model: ModelConfig, layout: Layout) -> list[Stage]:
    """Every stage of the pipeline; rank r holds chunks r, r + P, r + 2P, … of the tower."""
    stages = _stages(model.vision.depth, layout.pipeline, layout.virtual, layout.layers)
    if not layout.freeze:
        return stages
    frozen = frozen_in(model, layout.freeze)
    layers = stage_layers(model.vision.depth, layout.pipeline * layout.virtual, layout.layers)
    # A norm in front of the product is trained, and a recomputed block asks for a gradient at its input.
    bare = model.vision.post_norm and layout.recompute != "full" and 1 <= frozen.vision <= model.vision.depth
    return [_with_frozen(stage, frozen, layers, layout.pipeline, bare) for stage in stages]


def _with_frozen(stage: Stage, frozen: Frozen, layers: list[range], stages: int, bare: bool) -> Stage:
    first, own = frozen.first_chunk(layers), range(stage.rank, len(layers), stages)
    left = [number for number in own if number >= first]
    below = {number: frozen.vision_blocks_below(layers[number]) for number in left}
    has_embedding = stage.has_embedding and first == 0 and not below[0]
    above = replace(
        stage,
        chunks=tuple(len(layers[number]) - below[number] if number in below else 0 for number in own),
        has_embedding=has_embedding,
        has_head=stage.has_head and not frozen.locks_vision,
        inputs=len(left) - has_embedding,
        returned=sum(number > first for number in own),
        reads_no_gradient=bare and first in own,
    )
    return replace(stage, repeated=above)


@lru_cache(maxsize=256)
def frozen_in(model: ModelConfig, freeze: tuple[str, ...]) -> Frozen:
    """What some patterns freeze of a model; learned scalars are not looked at."""
    names = [*vision_shapes(model), *text_shapes(model)]
    return frozen_parts(model, frozen_names(freeze, names), names)


def trains_images(model: ModelConfig, layout: Layout) -> bool:
    """Whether gradients of the image embeddings have anywhere to go."""
    return not layout.freeze or not frozen_in(model, layout.freeze).locks_vision


def text_above(model: ModelConfig, layout: Layout) -> ModelConfig | None:
    """The model with those blocks of the caption tower alone that are repeated and have a backward; None: none is."""
    if not layout.freeze:
        return model
    frozen = frozen_in(model, layout.freeze)
    depth = model.text.depth - frozen.text_blocks_below
    return None if frozen.locks_text else replace(model, text=replace(model.text, depth=depth))


@lru_cache(maxsize=256)
def trained_text_parameters(model: ModelConfig, freeze: tuple[str, ...]) -> int:
    """Elements of the caption tower with gradients."""
    frozen = frozen_in(model, freeze).names
    return elements({name: shape for name, shape in text_shapes(model).items() if name not in frozen})


@lru_cache(maxsize=1024)
def _stages(depth: int, stages: int, virtual: int, layers: tuple[int, ...] | None) -> list[Stage]:
    counts = layers or even_layers(depth, stages * virtual)
    return [
        Stage(
            rank=rank,
            chunks=tuple(counts[rank::stages]),
            has_embedding=rank == 0,
            has_head=rank == stages - 1,
        )
        for rank in range(stages)
    ]


def bf16_blocks(model: ModelConfig, layout: Layout, stage: Stage) -> list[int]:
    """Blocks of each chunk of a stage that stay bf16 under fp8: those at the tower's ends (model.fp8_bf16_blocks)."""
    edge, depth = model.fp8_bf16_blocks, model.vision.depth
    if not edge:
        return [0] * len(stage.chunks)
    chunks = stage_layers(depth, layout.pipeline * layout.virtual, layout.layers)[stage.rank :: layout.pipeline]
    own = [range(chunk.stop - blocks, chunk.stop) for chunk, blocks in zip(chunks, stage.chunks, strict=True)]
    return [sum(block < edge or block >= depth - edge for block in chunk) for chunk in own]


def telling_stages(stages: list[Stage]) -> list[Stage]:
    """The stages among which the extremes of memory and time are: first, last, and the fullest of the others."""
    inner = stages[1:-1]
    fullest = [max(inner, key=lambda stage: stage.blocks)] if inner else []
    return list(dict.fromkeys([stages[0], *fullest, stages[-1]]))


@lru_cache(maxsize=256)
def text_blocks(text: TextConfig) -> VisionConfig:
    """The blocks of the caption tower in the words of the image tower: pre-norm."""
    return VisionConfig(
        depth=text.depth,
        width=text.width,
        head_width=text.width // text.heads,
        mlp_hidden=text.hidden,
        norm=text.norm,
        norm_eps=text.norm_eps,
        qkv_bias=text.bias,
        mlp="swiglu" if text.mlp == "swiglu" else "gelu",
        rope=text.rope,
    )
