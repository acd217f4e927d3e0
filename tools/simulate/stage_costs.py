"""What the simulator needs of a config on planned hardware: program, seconds of each stage, collectives. Projected."""

from collections.abc import Sequence
from typing import Any

from engine.config.read import Config
from engine.objectives.registry import objective_of
from models.config import ModelConfig
from tools.cost.cluster import Cluster
from tools.cost.compute import teachers_seconds
from tools.cost.layout import Layout, Stage, layout_of, stages_of
from tools.cost.memory import single_chunks
from tools.cost.mim import mim_costs, student_of
from tools.cost.time import (
    UnitTime,
    contrastive_optimizer_seconds,
    deal_seconds,
    host_excess,
    loss_seconds,
    slowest,
    state_time,
    text_state_seconds,
    text_step,
    unit_time,
    vision_transfer_seconds,
)
from tools.simulate.events import CollectiveCosts, Simulation, StageCosts, durations_of, simulate
from tools.simulate.wires import ShardCosts, Wire


def simulate_config(config: Config, cluster: Cluster) -> Simulation:
    """A step of a config without phases, of any objective, on all GPUs of the cluster."""
    layout, objective = layout_of(config, cluster.gpus), objective_of(config)
    costs = _mim_costs if objective.distils else _contrastive_costs
    return simulate(
        objective.program(config, layout.data),
        durations_of(*costs(config, layout, cluster)),
        _wire(config.model, layout, cluster),
        None if layout.shard == "optimizer" else _shards(config.model, layout, cluster),
    )


def _shards(model: ModelConfig, layout: Layout, cluster: Cluster) -> list[ShardCosts]:
    """Chunks over the data axis, the captions over all ranks; the captions' gradients are reduced at the step's end."""
    _, of_text = text_state_seconds(model, layout, cluster)
    found = []
    for stage in stages_of(model, layout):
        chunks = [vision_transfer_seconds(model, layout, chunk, cluster) for chunk in single_chunks(stage)]
        found.append(
            ShardCosts(
                gather_s=(*(gather for _, gather in chunks), of_text),
                reduce_s=(*(reduce for reduce, _ in chunks), 0.0),
                overlap=layout.overlap,
            )
        )
    return found


def _wire(model: ModelConfig, layout: Layout, cluster: Cluster) -> Wire:
    latency_s = cluster.hardware.latency_us * 1e-6
    message_s = cluster.message_seconds(layout, layout.message_bytes(model.vision))
    return Wire(latency_s=latency_s, transfer_s=message_s - latency_s)


def _contrastive_costs(config: Config, layout: Layout, cluster: Cluster) -> tuple[list[StageCosts], CollectiveCosts]:
    """What no work hides: of the planner's reduction and gathering of weights what is at the step's ends, of copies to
    the host what the encode phase does not hide (before the loss), and of those back what backprop does not.
    """
    model = config.model
    encode_text, backward_text = text_step(model, layout, cluster.hardware)
    stages = stages_of(model, layout)
    units = [unit_time(model, layout, stage, cluster) for stage in stages]
    slow = slowest(layout, units)
    state = state_time(model, layout, stages[slow], units[slow], backward_text, cluster)
    copied, copied_back = host_excess(model, layout, stages[slow], units[slow], cluster.hardware)
    together = CollectiveCosts(
        deal_s=deal_seconds(model, layout, cluster),
        loss_s=copied + loss_seconds(model, layout, cluster),
        reduce_s=copied_back + state.ends,
        optimizer_s=contrastive_optimizer_seconds(model, layout, stages[slow], cluster.hardware),
    )
    taught = teachers_seconds(layout, cluster.hardware)
    costs = _stage_costs(
        stages,
        units,
        encode_text_s=encode_text,
        backward_text_s=backward_text,
        caption_parts=layout.caption_parts,
        teacher_s=taught,
    )
    return costs, together


def _mim_costs(config: Config, layout: Layout, cluster: Cluster) -> tuple[list[StageCosts], CollectiveCosts]:
    costs = mim_costs(config, layout, cluster)
    stages = _stage_costs(stages_of(student_of(config), layout), costs.units, teacher_s=costs.teacher_s)
    return stages, CollectiveCosts(exchange_s=costs.exchange_s, reduce_s=costs.state_s, optimizer_s=costs.optimizer_s)


def _stage_costs(stages: Sequence[Stage], units: Sequence[UnitTime], **alone: Any) -> list[StageCosts]:
    """Collectives of the tensor axis are part of the units."""
    return [
        StageCosts(
            forward_s=_by_chunk(unit.f, stage),
            backward_s=_by_chunk(unit.b, stage.above),
            replay_s=_by_chunk(unit.r, stage.above),
            **alone,
        )
        for stage, unit in zip(stages, units, strict=True)
    ]


def _by_chunk(seconds: float, stage: Stage) -> tuple[float, ...]:
    """A head alone counts as a block: it has the seconds of its stage."""
    weights = stage.chunks if stage.blocks else (*[0] * (len(stage.chunks) - 1), 1)
    return tuple(seconds * weight / sum(weights) for weight in weights)
