"""Seconds of a step of masked-feature distillation by part, on the ranks of the slowest stage. Projected.

The student is a CLIP's image tower whose last block works for every token, since its head reads masked patches, and it
runs 1F1B (engine/objectives/mim/program.py): (m + (P - 1) / v) (f + b). The teacher goes first, a whole tower on every
rank, forward only, each with its share of the replica's images.
"""

from dataclasses import dataclass, replace

from engine.config.read import Config
from models.config import ModelConfig
from tools.cost.cluster import Cluster
from tools.cost.compute import stage_seconds
from tools.cost.layout import BYTES, Layout, Stage, stages_of, telling_stages
from tools.cost.memory import stage_parameters
from tools.cost.time import UnitTime, optimizer_seconds, unit_time, vision_state_seconds


@dataclass(frozen=True, kw_only=True)
class MimCosts:
    """What the stages of a job spend, in seconds."""

    units: list[UnitTime]
    """A micro-batch of each stage."""
    teacher_s: float
    """A rank's share of the teaching."""
    exchange_s: float
    """Images to the ranks, or targets to the last stage: the dearer of both."""
    state_s: float
    """Reduction of gradients and gathering of weights that no work hides."""
    optimizer_s: float


def student_of(config: Config) -> ModelConfig:
    """The student as a CLIP that costs the same; its head reads every token and is as wide as the teacher's features.

    The head itself is counted for one token of each image, which is within 0.1 % of a step.
    """
    assert config.mim.teacher_model is not None, "the config was not resolved"
    vision = replace(config.model.vision, pool="mean")
    return replace(config.model, vision=vision, embed_dim=config.mim.teacher_model.embed_dim)


def mim_costs(config: Config, layout: Layout, cluster: Cluster) -> MimCosts:
    """Costs of a config with objective=mim on this layout."""
    student, hardware = student_of(config), cluster.hardware
    stages = stages_of(student, layout)
    slow = max(telling_stages(stages), key=lambda stage: unit_time(student, layout, stage, cluster).b)
    held = stage_parameters(student, layout, slow)
    return MimCosts(
        units=[unit_time(student, layout, stage, cluster) for stage in stages],
        teacher_s=_teacher_seconds(config, layout, cluster),
        exchange_s=_exchange_seconds(config, layout, cluster),
        state_s=vision_state_seconds(student, layout, slow, unit_time(student, layout, slow, cluster), cluster),
        optimizer_s=optimizer_seconds(held / layout.data, held, layout, hardware),
    )


def _teacher_seconds(config: Config, layout: Layout, cluster: Cluster) -> float:
    """A micro-batch a pass, without tensor parallelism."""
    teacher = config.mim.teacher_model
    assert teacher is not None
    whole = Stage(rank=0, chunks=(teacher.vision.depth,), has_embedding=True, has_head=True)
    precision = config.mim.teacher_precision or layout.precision
    alone = replace(layout, tensor=1, pipeline=1, virtual=1, patch_dropout=0.0, precision=precision, layers=None)
    vision = replace(teacher.vision, pool="mean")  # the patches are looked at
    once = stage_seconds(replace(teacher, vision=vision), alone, whole, cluster.hardware)
    return once.forward * layout.own_rows / layout.micro_batch


def _exchange_seconds(config: Config, layout: Layout, cluster: Cluster) -> float:
    """Over the pipeline; one stage has no other to send to."""
    if layout.pipeline == 1:
        return 0.0
    teacher = config.mim.teacher_model
    assert teacher is not None
    images = layout.own_rows * 3 * config.model.vision.image_size**2
    element = BYTES[config.mim.teacher_precision or layout.precision]
    targets = layout.own_rows * config.mim.masked_patches * teacher.embed_dim * element
    return (layout.pipeline - 1) * cluster.message_seconds(layout, max(images, targets))
