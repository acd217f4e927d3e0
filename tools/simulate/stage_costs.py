"""What the simulator needs of a config on planned hardware: schedule, seconds of each stage, collectives. Projected."""

from models.config import ModelConfig
from tools.cost.cluster import Cluster
from tools.cost.compute import text_seconds
from tools.cost.layout import Layout, Stage, stages_of
from tools.cost.time import loss_seconds, step_time, unit_time
from tools.simulate.events import CollectiveCosts, StageCosts
from tools.simulate.step_program import Schedule


def planned_schedule(model: ModelConfig, layout: Layout, cluster: Cluster) -> Schedule:
    """Units and messages."""
    latency_s = cluster.hardware.latency_us * 1e-6
    return Schedule(
        stages=layout.pipeline,
        micro_batches=layout.micro_batches,
        chunks=layout.virtual,
        keep=layout.keep,
        latency_s=latency_s,
        transfer_s=cluster.message_seconds(layout, layout.message_bytes(model.vision)) - latency_s,
    )


def planned_stages(model: ModelConfig, layout: Layout, cluster: Cluster) -> list[StageCosts]:
    """Costs of every stage, tensor-parallel collectives included."""
    encode_text, backward_text = text_seconds(
        model, layout.own_rows, layout.captions_at_once, cluster.hardware, layout.element_bytes
    )
    replay_text = 0.0 if layout.keep == layout.micro_batches else encode_text
    costs = []
    for stage in stages_of(model, layout):
        unit = unit_time(model, layout, stage, cluster)
        costs.append(
            StageCosts(
                encode_s=_by_chunk(unit.f, stage),
                replay_s=_by_chunk(unit.f, stage),
                backward_s=_by_chunk(unit.b, stage),
                encode_text_s=encode_text,
                backward_text_s=replay_text + backward_text,
            )
        )
    return costs


def planned_collectives(model: ModelConfig, layout: Layout, cluster: Cluster) -> CollectiveCosts:
    """What no work hides; `data` of the planner is reduction and gathering of weights together."""
    time = step_time(model, layout, cluster)
    return CollectiveCosts(loss_s=loss_seconds(model, layout, cluster), reduce_s=time.data, optimizer_s=time.optimizer)


def _by_chunk(seconds: float, stage: Stage) -> tuple[float, ...]:
    return tuple(seconds * blocks / stage.blocks for blocks in stage.chunks)
