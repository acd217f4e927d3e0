"""What a step of masked-feature distillation takes: seconds, projected, and memory, derived.

The student is a CLIP's image tower whose last block works for every token, since its head reads masked patches, and it
runs 1F1B (engine/objectives/mim/program.py): (m + (P - 1) / v) (f + b). With v > 1 the first P micro-batches go round
the ring v - 1 times, and the last P back: their messages are waited for, those in between hide behind the other
direction's work. The teacher goes first, a whole tower on every rank, forward only, each with its share of the
replica's images.
"""

from dataclasses import dataclass, replace

from engine.config.read import Config
from engine.objectives.mim.program import MimProgram
from models.config import ModelConfig
from tools.cost.activations import micro_batch_saved_bytes, vision_temporary_bytes
from tools.cost.cluster import Cluster, decoding_nodes
from tools.cost.compute import frozen_images_seconds
from tools.cost.counts import vision_parameters
from tools.cost.layout import BYTES, Layout, stages_of, telling_stages
from tools.cost.memory import buffer_bytes, stage_parameters, state_bytes
from tools.cost.time import (
    UnitTime,
    input_seconds,
    optimizer_seconds,
    unit_time,
    vision_state_seconds,
    watched_bytes,
)


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


@dataclass(frozen=True, kw_only=True)
class MimEstimate:
    """One way to run a job."""

    layout: Layout
    in_flight: int
    """Units whose activations a first stage holds at once."""
    memory_bytes: dict[str, float]
    """Memory of the fullest rank at its peak, the first student's backward, by part."""
    step_s: float
    """Seconds of a step."""
    bubble_s: float
    """Waiting of it while the pipeline fills and drains."""

    @property
    def peak_bytes(self) -> float:
        """All of it."""
        return sum(self.memory_bytes.values())


def student_of(config: Config) -> ModelConfig:
    """The student as a CLIP that costs the same; its head reads every token and is as wide as the teacher's features.

    The head itself is counted for one token of each image, which is within 0.1 % of a step.
    """
    vision = replace(config.model.vision, pool="mean")
    return replace(config.model, vision=vision, embed_dim=_teacher(config).embed_dim)


def mim_costs(config: Config, layout: Layout, cluster: Cluster, *, every_stage: bool = True) -> MimCosts:
    """Costs of a config with objective=mim on this layout. every_stage: False for those alone that differ in kind."""
    student, hardware = student_of(config), cluster.hardware
    stages = stages_of(student, layout)
    chosen = stages if every_stage else telling_stages(stages)
    units = [unit_time(student, layout, stage, cluster) for stage in chosen]
    unit, slow = max(zip(units, chosen, strict=True), key=lambda pair: pair[0].f + pair[0].b)
    held = stage_parameters(student, layout, slow)
    return MimCosts(
        units=units,
        teacher_s=_teacher_seconds(config, layout, cluster),
        exchange_s=_exchange_seconds(config, layout, cluster),
        state_s=vision_state_seconds(student, layout, slow, unit, cluster),
        optimizer_s=optimizer_seconds(held / layout.data, held, layout, hardware)
        + watched_bytes(held / layout.data, held, 0.0, layout) / hardware.memory_bytes_s,
    )


def mim_memory(config: Config, layout: Layout, in_flight: int) -> dict[str, float]:
    """Part -> bytes of a rank of the first stage, which has most units in flight, in its last backward of the fill.

    Inputs of chunks are among the activations: they wait for the backward, too.
    """
    student, stage = student_of(config), stages_of(student_of(config), layout)[0]
    weights, gradients, optimizer = state_bytes(
        layout, stage_parameters(student, layout, stage), layout.data, layout.data
    )
    saved = in_flight * micro_batch_saved_bytes(student, layout, stage) / layout.virtual
    precision = config.mim.teacher_precision or layout.precision
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "teacher": vision_parameters(_teacher(config)) * BYTES[precision],
        "activations": saved + vision_temporary_bytes(student, layout, stage),
        "buffers": buffer_bytes(student, layout, stage),
    }


def mim_estimate(config: Config, layout: Layout, cluster: Cluster) -> MimEstimate:
    """Memory and seconds of a layout that divides; what tools.simulate adds up action by action, in closed form."""
    program = MimProgram(stages=layout.pipeline, micro_batches=layout.micro_batches, chunks=layout.virtual)
    in_flight = program.in_flight(0)
    costs = mim_costs(config, layout, cluster, every_stage=False)
    unit = max(costs.units, key=lambda unit: unit.f + unit.b)
    each = cluster.message_seconds(layout, layout.message_bytes(config.model.vision)) if layout.pipeline > 1 else 0.0
    bubble_s = (layout.pipeline - 1) * ((unit.f + unit.b) / layout.virtual + 2 * each)
    bubble_s += 2 * layout.pipeline * (layout.virtual - 1) * each
    alone = costs.teacher_s + 2 * costs.exchange_s + costs.state_s + costs.optimizer_s
    work_s = layout.micro_batches * (unit.f + unit.b) + alone + bubble_s
    input_s = input_seconds(config.model, layout, work_s, cluster, decoding_nodes(layout, cluster))
    return MimEstimate(
        layout=layout,
        in_flight=in_flight,
        memory_bytes=mim_memory(config, layout, in_flight),
        step_s=work_s + input_s,
        bubble_s=bubble_s,
    )


def _teacher(config: Config) -> ModelConfig:
    assert config.mim.teacher_model is not None, "the config was not resolved"
    return config.mim.teacher_model


def _teacher_seconds(config: Config, layout: Layout, cluster: Cluster) -> float:
    teacher = _teacher(config)
    precision = config.mim.teacher_precision or layout.precision
    vision = replace(teacher.vision, pool="mean")  # the patches are looked at
    return frozen_images_seconds(replace(teacher, vision=vision), precision, layout, cluster.hardware)


def _exchange_seconds(config: Config, layout: Layout, cluster: Cluster) -> float:
    """Over the pipeline; one stage has no other to send to."""
    if layout.pipeline == 1:
        return 0.0
    teacher = _teacher(config)
    images = layout.own_rows * 3 * config.model.vision.image_size**2
    element = BYTES[config.mim.teacher_precision or layout.precision]
    targets = layout.own_rows * config.mim.masked_patches * teacher.embed_dim * element
    return (layout.pipeline - 1) * cluster.message_seconds(layout, max(images, targets))
