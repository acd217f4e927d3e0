"""This rank's parts of the model, their flat buffers and the optimizer over them, from a config and a mesh.

A rank holds one or more chunks of the vision tower (more than one with virtual stages) and the whole text side. Each is
wrapped in megatron-core's DistributedDataParallel on its own: flat fp32 gradient buckets, reduce-scatter, all-gather.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.config.read import Config
from engine.config.sections.freeze import Frozen, frozen_of
from engine.config.stages import stage_layers
from engine.objectives.registry import objective_of
from engine.optim.groups import tensor_group
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.mesh import Axis, Mesh
from engine.parallel.replicas import Buckets, FrozenBuffer, frozen_buffers, in_buckets, start_gather
from engine.parallel.sharded import ShardedPart, own_slice
from engine.parallel.shards import TowerShards
from models.clip import LogitBias, LogitScale
from models.tensors.init import every_name, initialise
from models.tensors.naming import LogicalTensor, logical_name, logical_tensors
from models.towers.text import TextTower
from models.towers.vision import VisionTower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TextSide(nn.Module):
    """What every rank holds whole: the text tower and, where they are learned, the logit scale and bias."""

    def __init__(self, tower: TextTower, logit_scale: LogitScale | None, logit_bias: LogitBias | None):
        super().__init__()
        self.tower = tower
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias


@dataclass
class Part:
    """One wrapped module and who shares it."""

    ddp: Buckets
    logical: dict[str, LogicalTensor]
    """Local parameter name -> logical tensor."""
    owners: Axis
    """Ranks with the same slices: gradients are reduce-scattered and weights all-gathered over them."""
    holders: Axis
    """Ranks with any slice of these logical tensors."""
    tensor_rank: int
    sharded: ShardedPart | None = None
    """None: weights and gradients are always whole on every owner (parallel.shard: optimizer)."""
    frozen: list[FrozenBuffer] = field(default_factory=list)
    """What is not trained, if anything: without gradients, and not gathered after a step."""

    def last_backward(self, is_last: bool) -> AbstractContextManager:
        """Context of a backward: a bucket's reduction starts in the step's last one, as soon as it is complete."""
        overlapped = self.ddp.ddp_config.overlap_grad_reduce
        return self.ddp.no_sync() if overlapped and not is_last else nullcontext()

    def wait_for_weights(self) -> None:
        """A gather of new weights that is under way ends."""
        if self.ddp.ddp_config.overlap_param_gather:
            for group in self.ddp.bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """The part's weights can be read in the block, outside a step. Collective over the owners."""
        self.wait_for_weights()
        if self.sharded is None or self.sharded.is_whole:
            yield
            return
        self.sharded.wait()
        try:
            yield
        finally:
            self.sharded.release()

    def partial_gradients(self) -> list[Tensor]:
        """Gradients that each tensor rank has of its own tokens only (norms, biases, embedding); of the owned elements
        at least.
        """
        if self.sharded is not None:
            return self.sharded.partial_gradients()
        trained = [p for p in self.ddp.module.parameters() if p.requires_grad]
        return [p.main_grad for p in trained if getattr(p, "sequence_parallel", False)]  # type: ignore[attr-defined]

    def gather_frozen(self) -> None:
        """Bring what is not trained to every owner, after it was loaded. Collective over the owners."""
        if self.sharded is not None and self.sharded.axes is not None:
            self.sharded.publish_frozen()
        elif self.owners.size > 1:
            for buffer in self.frozen:
                own = own_slice(buffer.param_data, self.owners)
                for work in start_gather(buffer.param_data, own, self.owners.group):
                    work.wait()


@dataclass
class Towers:
    """This rank's part of the model."""

    mesh: Mesh
    vision: list[VisionTower]
    """Chunks in tower order."""
    side: TextSide | None
    """None where the objective has no captions."""
    parts: list[Part]
    """Wrapped: the vision chunks, then the text side if there is one."""

    @property
    def text_side(self) -> TextSide:
        """The caption tower and the logit scale, of an objective that has them."""
        assert self.side is not None, "this objective has no captions"
        return self.side

    def logical_parameters(self) -> list[tuple[LogicalTensor, nn.Parameter]]:
        """(logical tensor, local slice) of everything this rank holds."""
        return [
            (part.logical[name], parameter)
            for part in self.parts
            for name, parameter in part.ddp.module.named_parameters()
        ]

    def zero_gradients(self) -> None:
        """Set the gradient sums to zero, as every step begins."""
        for part in self.parts:
            if part.sharded is not None:
                part.sharded.reset()
            else:
                part.ddp.zero_grad_buffer()

    def finish_reduction(self) -> None:
        """Wait until the gradients of the owned elements are complete, after the last backward. Collective."""
        for part in self._shared_parts():
            if part.sharded is not None:
                part.sharded.finish()
            else:
                part.ddp.finish_grad_sync()

    def gather_weights(self, wait: bool = False) -> None:
        """Start (overlapped) or do the all-gather of the new weights, after the update. Collective.

        Of parts whose weights are sharded the ranks that gather them learn of the new ones.
        """
        for part in self._shared_parts():
            if part.sharded is not None and part.sharded.axes is not None:
                part.sharded.publish()
            else:
                part.ddp.start_param_sync(force_sync=wait)

    def gather_frozen(self) -> None:
        """Bring what is not trained to every rank that holds it, after it was loaded. Collective."""
        for part in self.parts:
            part.gather_frozen()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Every weight of this rank's parts can be read in the block, outside a step. Collective."""
        with ExitStack() as parts:
            for part in self.parts:
                parts.enter_context(part.whole_weights())
            yield

    def _shared_parts(self) -> list[Part]:
        """Parts with more than one owner; gloo copies whole buffers even in a group of one (6 % of a bf16 step)."""
        return [part for part in self.parts if part.owners.size > 1]

    def wait_for_weights(self) -> None:
        """Wait for the new weights, before they are read outside a forward pass (by a checkpoint for example)."""
        for part in self.parts:
            part.wait_for_weights()


def build_towers(config: Config, mesh: Mesh, device: torch.device, drawn: Callable[[str], bool] = every_name) -> Towers:
    """Build, initialise, wrap and shard, part by part: no more than one is whole where weights are sharded.

    drawn: whether a logical tensor gets an initial value; what a checkpoint fills needs none. Collective over the mesh.
    """
    chunks, parts = [], []
    rule = objective_of(config).initial_values()
    frozen = frozen_of(config)
    for chunk in _vision_chunks(config, mesh, device):
        logical = logical_tensors(chunk, "vision", chunk.layers.start, mesh.tensor.size)
        _freeze(chunk, logical, frozen)
        chunk.divide(frozen.vision_blocks_below(chunk.layers))
        part = Part(
            ddp=in_buckets(chunk, chunk.config, mesh.vision_groups(), config.parallel),
            logical=logical,
            owners=mesh.data,
            holders=mesh.stage,
            tensor_rank=mesh.tensor.rank,
            frozen=frozen_buffers([chunk.parameters()], mesh.data.size),
        )
        initialise(
            chunk, part.logical, config.model, config.train.seed, mesh.tensor.rank, mesh.tensor.size, rule, drawn
        )
        part.sharded = _shard(part, "data", config, mesh)
        chunks.append(chunk)
        parts.append(part)
    side = _build_text_side(config, mesh, device) if objective_of(config).reads_captions else None
    if side is not None:
        logical = _text_side_tensors(side)
        _freeze(side, logical, frozen)
        side.tower.divide(frozen.text_blocks_below)
        # The loss, between the turns of the captions, reads the learned scalars and gives them their gradients.
        scalars = [*_parameters(side.logit_scale), *_parameters(side.logit_bias)]
        part = Part(
            ddp=in_buckets(side, side.tower.config, mesh.text_groups(), config.parallel),
            logical=logical,
            owners=mesh.world,
            holders=mesh.world,
            tensor_rank=0,
            frozen=frozen_buffers([side.tower.parameters(), scalars], mesh.world.size),
        )
        initialise(side, part.logical, config.model, config.train.seed, 0, 1, rule, drawn)
        part.sharded = _shard(part, "world", config, mesh, scalars)
        parts.append(part)
    return Towers(mesh=mesh, vision=chunks, side=side, parts=parts)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _freeze(module: nn.Module, logical: dict[str, LogicalTensor], frozen: Frozen) -> None:
    """Let nothing want gradients that is frozen; the module is not in buckets yet, which hold what is trained."""
    for local, parameter in module.named_parameters():
        parameter.requires_grad_(logical[local].name not in frozen.names)


def _shard(
    part: Part, owners: str, config: Config, mesh: Mesh, resident: Sequence[nn.Parameter] = ()
) -> ShardedPart | None:
    """owners: axis of the part's owners by name; ranks that gather within a node are counted along the data axis."""
    parallel = config.parallel
    if parallel.shard == "optimizer" or part.owners.size == 1:
        return None
    if parallel.shard == "gradients":
        return ShardedPart(part.ddp, part.owners, None, resident, part.frozen)
    together = parallel.shard_ranks or part.owners.size
    if parallel.shard_ranks and owners == "world":
        together = parallel.shard_ranks * mesh.tensor.size
    return ShardedPart(part.ddp, part.owners, mesh.gather_axes(owners, together), resident, part.frozen)


def build_vision(config: Config, mesh: Mesh, device: torch.device) -> list[VisionTower]:
    """This rank's chunks of the vision tower, not initialised."""
    return list(_vision_chunks(config, mesh, device))


def _vision_chunks(config: Config, mesh: Mesh, device: torch.device) -> Iterator[VisionTower]:
    parallel, stages = config.parallel, mesh.pipeline.size
    layers = stage_layers(config.model.vision.depth, stages * parallel.virtual, parallel.layers)
    tower = objective_of(config).vision_tower(config)
    for chunk in range(parallel.virtual):
        with torch.device(device):
            built = tower(
                config.model,
                groups=mesh.vision_groups(),
                layers=layers[chunk * stages + mesh.pipeline.rank],
                sequence_parallel=parallel.sequence,
                dtype=DTYPES[config.train.precision],
                recompute=config.train.recompute,
            )
        yield built


def _build_text_side(config: Config, mesh: Mesh, device: torch.device) -> TextSide:
    train = config.train
    with torch.device(device):
        text = TextTower(config.model, groups=mesh.text_groups(), dtype=DTYPES[train.precision])
        scale = LogitScale() if train.logit_scale is None else None
        return TextSide(text, scale, LogitBias() if train.loss == "sigmoid" else None)


def _text_side_tensors(side: TextSide) -> dict[str, LogicalTensor]:
    table = {}
    for local, parameter in side.named_parameters():
        part, _, rest = local.partition(".")
        name = logical_name(rest, "text") if part == "tower" else local
        table[local] = LogicalTensor(name, tuple(parameter.shape), None)
    return table


def build_optimizer(config: Config, towers: Towers, schedule_steps: int | None = None) -> ShardedOptimizer:
    """LAMB or AdamW over the owned shards of every part. schedule_steps: of warm-up and cosine; None: train.steps."""
    pairs = []
    for part in towers.parts:
        shards = _shards(part)
        groups = [tensor_group(t.name, len(t.shape), config.model, config.optim) for t in shards.tensors]
        pairs.append((shards, groups))
    frozen = [_shards(part, part.frozen) for part in towers.parts if part.frozen]
    return ShardedOptimizer(pairs, config.optim, schedule_steps or config.train.steps, towers.mesh.world, frozen)


def _shards(part: Part, frozen: list[FrozenBuffer] | None = None) -> TowerShards:
    return TowerShards(
        part.ddp,
        part.logical,
        owners=part.owners,
        holders=part.holders,
        tensor_rank=part.tensor_rank,
        sharded=part.sharded,
        frozen=frozen,
    )
