"""From a config and a mesh to this rank's towers, their flat buffers and the optimizer over them."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn

from engine.config import Config
from engine.mesh import Mesh, stage_layers
from engine.optim.groups import tensor_group
from engine.optim.lamb import ShardedOptimizer
from engine.optim.shards import TowerShards
from models.clip import LogitScale
from models.init import initialise
from models.naming import LogicalTensor, logical_name, logical_tensors
from models.text import TextTower
from models.vision import VisionTower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TextSide(nn.Module):
    """What every rank holds whole: the text tower and, if it is learned, the logit scale."""

    def __init__(self, tower: TextTower, logit_scale: LogitScale | None):
        super().__init__()
        self.tower = tower
        self.logit_scale = logit_scale


@dataclass
class Towers:
    """This rank's part of the model, wrapped in megatron-core's gradient buffers."""

    vision: VisionTower
    text: TextTower
    logit_scale: LogitScale | None
    vision_ddp: DistributedDataParallel
    text_ddp: DistributedDataParallel
    vision_logical: dict[str, LogicalTensor]
    """Local parameter name of the stage -> logical tensor."""
    text_logical: dict[str, LogicalTensor]
    mesh: Mesh

    @property
    def ddps(self) -> tuple[DistributedDataParallel, DistributedDataParallel]:
        """Both wrapped towers."""
        return self.vision_ddp, self.text_ddp

    def scale(self, fixed: float | None) -> Tensor | float:
        """The factor on the cosine similarities of this step."""
        return fixed if self.logit_scale is None else self.logit_scale()  # type: ignore[return-value]

    def logical_parameters(self) -> list[tuple[LogicalTensor, nn.Parameter]]:
        """(logical tensor, local slice) of everything this rank holds."""
        pairs = []
        for ddp, table in ((self.vision_ddp, self.vision_logical), (self.text_ddp, self.text_logical)):
            pairs += [(table[name], parameter) for name, parameter in ddp.module.named_parameters()]
        return pairs


def build_towers(config: Config, mesh: Mesh, device: torch.device) -> Towers:
    """Build, initialise and wrap. Collective over the mesh."""
    dtype = DTYPES[config.train.precision]
    layers = stage_layers(config.model.vision.depth, mesh.pipeline.size)[mesh.pipeline.rank]
    with torch.device(device):
        vision = VisionTower(
            config.model,
            groups=mesh.vision_groups(),
            layers=layers,
            sequence_parallel=config.parallel.sequence,
            dtype=dtype,
        )
        text = TextTower(config.model, groups=mesh.text_groups(), dtype=dtype)
        logit_scale = LogitScale() if config.train.logit_scale is None else None
    side = TextSide(text, logit_scale)
    vision_logical = logical_tensors(vision, "vision", layers.start, mesh.tensor.size)
    text_logical = _text_side_tensors(side)
    seed = config.train.seed
    initialise(vision, vision_logical, config.model, seed, mesh.tensor.rank, mesh.tensor.size)
    initialise(side, text_logical, config.model, seed, 0, 1)
    return Towers(
        vision=vision,
        text=text,
        logit_scale=logit_scale,
        vision_ddp=_wrap(vision, vision.config, mesh.vision_groups()),
        text_ddp=_wrap(side, text.config, mesh.text_groups()),
        vision_logical=vision_logical,
        text_logical=text_logical,
        mesh=mesh,
    )


def _text_side_tensors(side: TextSide) -> dict[str, LogicalTensor]:
    table = {}
    for local, parameter in side.named_parameters():
        tower, _, rest = local.partition(".")
        name = f"{local}" if tower == "logit_scale" else logical_name(rest, "text")
        table[local] = LogicalTensor(name, tuple(parameter.shape), None)
    return table


def _wrap(module: nn.Module, transformer_config, groups) -> DistributedDataParallel:
    """Flat buckets, fp32 gradient sums, reduce-scatter and all-gather over groups.dp."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=True
    )
    return DistributedDataParallel(transformer_config, settings, module, pg_collection=groups)


def build_optimizer(config: Config, towers: Towers) -> ShardedOptimizer:
    """LAMB or AdamW over the owned shards of both towers."""
    mesh = towers.mesh
    vision = TowerShards(
        towers.vision_ddp,
        towers.vision_logical,
        owners=mesh.data,
        holders=mesh.stage,
        tensor_rank=mesh.tensor.rank,
    )
    text = TowerShards(towers.text_ddp, towers.text_logical, owners=mesh.world, holders=mesh.world, tensor_rank=0)
    pairs = [
        (shards, [tensor_group(t.name, len(t.shape), config.model, config.optim) for t in shards.tensors])
        for shards in (vision, text)
    ]
    return ShardedOptimizer(pairs, config.optim, config.train.steps, mesh.world)
