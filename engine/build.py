"""From a config and a mesh to this rank's parts of the model, their flat buffers and the optimizer over them.

A rank holds one or more chunks of the vision tower (more than one with virtual stages) and the whole text side. Each is
wrapped in megatron-core's DistributedDataParallel on its own: flat fp32 gradient buckets, reduce-scatter, all-gather.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from engine.config.read import Config
from engine.config.stages import stage_layers
from engine.objectives.registry import objective_of
from engine.optim.groups import tensor_group
from engine.optim.lamb import ShardedOptimizer
from engine.parallel.mesh import Axis, Mesh
from engine.parallel.shards import TowerShards
from models.clip import LogitBias, LogitScale
from models.tensors.init import initialise
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

    ddp: DistributedDataParallel
    logical: dict[str, LogicalTensor]
    """Local parameter name -> logical tensor."""
    owners: Axis
    """Ranks with the same slices: gradients are reduce-scattered and weights all-gathered over them."""
    holders: Axis
    """Ranks with any slice of these logical tensors."""
    tensor_rank: int

    def last_backward(self, is_last: bool) -> AbstractContextManager:
        """Context of a backward: a bucket's reduction starts in the step's last one, as soon as it is complete."""
        overlapped = self.ddp.ddp_config.overlap_grad_reduce
        return self.ddp.no_sync() if overlapped and not is_last else nullcontext()


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
        """Before a step."""
        for part in self.parts:
            part.ddp.zero_grad_buffer()

    def finish_reduction(self) -> None:
        """After the last backward: gradients of the owned elements are complete. Collective."""
        for part in self._shared_parts():
            part.ddp.finish_grad_sync()

    def gather_weights(self, wait: bool = False) -> None:
        """After the update: start (overlapped) or do the all-gather of the new weights. Collective."""
        for part in self._shared_parts():
            part.ddp.start_param_sync(force_sync=wait)

    def _shared_parts(self) -> list[Part]:
        """Parts with more than one owner; gloo copies whole buffers even in a group of one (6 % of a bf16 step)."""
        return [part for part in self.parts if part.owners.size > 1]

    def wait_for_weights(self) -> None:
        """Before weights are read outside a forward pass, by a checkpoint for example."""
        for part in self.parts:
            if part.ddp.ddp_config.overlap_param_gather:
                for group in part.ddp.bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)


def build_towers(config: Config, mesh: Mesh, device: torch.device) -> Towers:
    """Build, initialise and wrap. Collective over the mesh."""
    chunks = build_vision(config, mesh, device)
    side = _build_text_side(config, mesh, device) if objective_of(config).reads_captions else None
    parts = [
        Part(
            ddp=_wrap(chunk, chunk.config, mesh.vision_groups(), config),
            logical=logical_tensors(chunk, "vision", chunk.layers.start, mesh.tensor.size),
            owners=mesh.data,
            holders=mesh.stage,
            tensor_rank=mesh.tensor.rank,
        )
        for chunk in chunks
    ]
    if side is not None:
        ddp = _wrap(side, side.tower.config, mesh.text_groups(), config)
        parts.append(Part(ddp, _text_side_tensors(side), owners=mesh.world, holders=mesh.world, tensor_rank=0))
    rule = objective_of(config).initial_values()
    for part in parts:
        size = 1 if part.ddp.module is side else mesh.tensor.size
        initialise(part.ddp.module, part.logical, config.model, config.train.seed, part.tensor_rank, size, rule)
    return Towers(mesh=mesh, vision=chunks, side=side, parts=parts)


def build_vision(config: Config, mesh: Mesh, device: torch.device) -> list[VisionTower]:
    """This rank's chunks of the vision tower, not initialised."""
    parallel, stages = config.parallel, mesh.pipeline.size
    layers = stage_layers(config.model.vision.depth, stages * parallel.virtual, parallel.layers)
    tower = objective_of(config).vision_tower(config)
    with torch.device(device):
        return [
            tower(
                config.model,
                groups=mesh.vision_groups(),
                layers=layers[chunk * stages + mesh.pipeline.rank],
                sequence_parallel=parallel.sequence,
                dtype=DTYPES[config.train.precision],
                recompute=config.train.recompute,
            )
            for chunk in range(parallel.virtual)
        ]


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


def _wrap(module: nn.Module, transformer_config, groups, config: Config) -> DistributedDataParallel:
    """Flat buckets, fp32 gradient sums, reduce-scatter and all-gather over groups.dp."""
    overlap = config.parallel.overlap and groups.dp.size() > 1
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=config.parallel.bucket_size,
    )
    ddp = DistributedDataParallel(transformer_config, settings, module, pg_collection=groups)
    for group in ddp.bucket_groups:
        # Fresh weights are the same everywhere; without this the first forward would gather them, and an evaluation
        # in which some ranks have nothing to do would wait for ever.
        group.param_gather_dispatched = True
    return ddp


def build_optimizer(config: Config, towers: Towers, schedule_steps: int | None = None) -> ShardedOptimizer:
    """LAMB or AdamW over the owned shards of every part. schedule_steps: of warm-up and cosine; None: train.steps."""
    pairs = []
    for part in towers.parts:
        shards = TowerShards(
            part.ddp, part.logical, owners=part.owners, holders=part.holders, tensor_rank=part.tensor_rank
        )
        groups = [tensor_group(t.name, len(t.shape), config.model, config.optim) for t in shards.tensors]
        pairs.append((shards, groups))
    return ShardedOptimizer(pairs, config.optim, schedule_steps or config.train.steps, towers.mesh.world)
