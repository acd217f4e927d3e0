"""What the simulator needs of a config on planned hardware: program, seconds of each stage, collectives. Projected."""

from collections.abc import Sequence
from typing import Any

from engine.config.read import Config
from engine.objectives.registry import objective_of
from models.config import ModelConfig
from tools.cost.cluster import Cluster
from tools.cost.layout import Layout, Stage, layout_of, stages_of
from tools.cost.mim import mim_costs, student_of
from tools.cost.time import UnitTime, loss_seconds, step_time, text_step, unit_time
from tools.simulate.events import CollectiveCosts, Simulation, StageCosts, Wire, durations_of, simulate


def simulate_config(config: Config, cluster: Cluster) -> Simulation:
    """A step of a config without phases, of any objective, on all GPUs of the cluster."""
    layout, objective = layout_of(config, cluster.gpus), objective_of(config)
    costs = _mim_costs if objective.distils else _contrastive_costs
    return simulate(
        objective.program(config, layout.data),
        durations_of(*costs(config, layout, cluster)),
        _wire(config.model, layout, cluster),
    )


def _wire(model: ModelConfig, layout: Layout, cluster: Cluster) -> Wire:
    latency_s = cluster.hardware.latency_us * 1e-6
    message_s = cluster.message_seconds(layout, layout.message_bytes(model.vision))
    return Wire(latency_s=latency_s, transfer_s=message_s - latency_s)


def _contrastive_costs(config: Config, layout: Layout, cluster: Cluster) -> tuple[list[StageCosts], CollectiveCosts]:
    """What no work hides: `data` of the planner is reduction and gathering of weights together."""
    model = config.model
    encode_text, backward_text = text_step(model, layout, cluster.hardware)
    stages = stages_of(model, layout)
    units = [unit_time(model, layout, stage, cluster) for stage in stages]
    time = step_time(model, layout, cluster)
    together = CollectiveCosts(
        loss_s=loss_seconds(model, layout, cluster), reduce_s=time.data, optimizer_s=time.optimizer
    )
    return _stage_costs(stages, units, encode_text_s=encode_text, backward_text_s=backward_text), together


def _mim_costs(config: Config, layout: Layout, cluster: Cluster) -> tuple[list[StageCosts], CollectiveCosts]:
    costs = mim_costs(config, layout, cluster)
    stages = _stage_costs(stages_of(student_of(config), layout), costs.units, teacher_s=costs.teacher_s)
    return stages, CollectiveCosts(exchange_s=costs.exchange_s, reduce_s=costs.state_s, optimizer_s=costs.optimizer_s)


def _stage_costs(stages: Sequence[Stage], units: Sequence[UnitTime], **alone: Any) -> list[StageCosts]:
    """Collectives of the tensor axis are part of the units."""
    return [
        StageCosts(
            forward_s=_by_chunk(unit.f, stage),
            backward_s=_by_chunk(unit.b, stage),
            replay_s=_by_chunk(unit.r, stage),
            **alone,
        )
        for stage, unit in zip(stages, units, strict=True)
    ]


def _by_chunk(seconds: float, stage: Stage) -> tuple[float, ...]:
    return tuple(seconds * blocks / stage.blocks for blocks in stage.chunks)
