"""Seconds of a contrastive step by part, on the ranks of the slowest stage. Projected from a hardware profile.

The program is engine/objectives/contrastive/program.py's. With m micro-batches, k of them kept, v chunks a rank and P
stages, f and b the forward and backward of one micro-batch on a stage (collectives over the tensor axis included):
- the stage works (2 m - k) f + m b (+ m f with full recomputation inside it);
- the bubble is (P - 1) / v x (f + b): the replay of the first micro-batch runs while its gradient travels;
- with v > 1 micro-batches go round in groups of P. Where a rank's chunks are uneven, its stages are apart by the time
  of the largest and have the work of the smallest to cover it; and a group's first message is waited for once a round;
- captions hide only before the first message: the second stage has f / v for their encoding, the last but one b / v
  for their backward; the rest delays everyone;
- collectives over the tensor axis are not overlapped; messages between stages are, while they take less than a unit;
- gradients are reduced during the last backward and weights gathered during the first forward: what exceeds these
  windows is left over.
"""

from dataclasses import dataclass, fields

from models.config import ModelConfig
from tools.cost.activations import FP32
from tools.cost.cluster import Cluster, decoding_nodes
from tools.cost.compute import stage_seconds, text_seconds
from tools.cost.counts import text_parameters
from tools.cost.hardware import Hardware
from tools.cost.layout import Layout, Stage, stages_of, telling_stages
from tools.cost.memory import optimizer_bytes_per_element, stage_parameters
from tools.cost.traffic import (
    block_backward_collectives,
    block_forward_collectives,
    stage_collectives,
    token_gradient_elements,
)

LOSS_PRODUCTS = 5
"""Strips of logits or gradients of own rows x all rows x D: logits three times, gradients twice."""
BUCKET_ELEMENTS = 40_000_000
OPTIMIZER_PASSES = 5
"""Reads and writes of the optimizer's state by LAMB's separate kernels, in units of that state."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    compute: float
    """Vision: encode, replay, backward."""
    tensor: float
    """Collectives of tensor parallelism."""
    p2p: float
    """Messages between stages, and copies of an offloaded stash, that no work hides."""
    bubble: float
    """Waiting while the pipeline fills and drains."""
    text: float
    """Captions that do not fit into a wait."""
    data: float
    """Reduction of gradients and gathering of weights that no work hides."""
    loss: float
    optimizer: float
    input: float
    """Pixels to the GPUs, and waiting for the decoding CPUs where these are slower."""

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class UnitTime:
    """One micro-batch on one stage: seconds of compute and of the tensor axis, forward and backward."""

    forward: float
    backward: float
    tensor_forward: float
    tensor_backward: float

    @property
    def f(self) -> float:
        """A forward with its collectives."""
        return self.forward + self.tensor_forward

    @property
    def b(self) -> float:
        """A backward with its collectives."""
        return self.backward + self.tensor_backward


def unit_time(model: ModelConfig, layout: Layout, stage: Stage, cluster: Cluster) -> UnitTime:
    """Time of one micro-batch through all chunks of `stage`; full recomputation is part of the backward."""
    forward, backward = stage_seconds(model, layout, stage, cluster.hardware)
    tensor_forward, tensor_backward = (
        _tensor_seconds(layout, stage_collectives(of_block, model.vision, layout, stage), cluster)
        for of_block in (block_forward_collectives, block_backward_collectives)
    )
    again = 1 if layout.recompute == "full" else 0
    return UnitTime(
        forward=forward,
        backward=backward + again * forward,
        tensor_forward=tensor_forward,
        tensor_backward=tensor_backward + again * tensor_forward,
    )


def _tensor_seconds(layout: Layout, collectives: dict[str, tuple[int, float]], cluster: Cluster) -> float:
    seconds = 0.0
    for kind, (count, sent) in collectives.items():
        whole = sent * layout.tensor if kind == "all-gather" else sent
        rounds = 2 if kind == "all-reduce" else 1
        seconds += rounds * cluster.collective_seconds(layout, "tensor", whole, count)
    return seconds


def step_time(model: ModelConfig, layout: Layout, cluster: Cluster) -> StepTime:
    """The whole step."""
    stages = telling_stages(stages_of(model, layout))
    units = [unit_time(model, layout, stage, cluster) for stage in stages]
    slow = max(range(len(stages)), key=lambda i: units[i].f + units[i].b)
    unit, stage, hardware = units[slow], stages[slow], cluster.hardware
    m, forwards = layout.micro_batches, 2 * layout.micro_batches - layout.keep
    fill = (layout.pipeline - 1) / layout.virtual
    bubble = fill * (unit.f + unit.b) + _uneven_rounds(layout, stage, unit)
    text_forward, text_backward = text_step(model, layout, hardware)
    before = dict(
        compute=forwards * unit.forward + m * unit.backward,
        tensor=forwards * unit.tensor_forward + m * unit.tensor_backward,
        p2p=_message_time(model, layout, unit, cluster),
        bubble=bubble,
        text=_left_over(text_forward, unit.f, layout) + _left_over(text_backward, unit.b, layout),
        data=_state_time(model, layout, stage, unit, text_backward, cluster),
        loss=loss_seconds(model, layout, cluster),
        optimizer=_optimizer_time(model, layout, stage, hardware),
    )
    nodes = decoding_nodes(layout, cluster)
    return StepTime(**before, input=input_seconds(model, layout, sum(before.values()), cluster, nodes))


def _uneven_rounds(layout: Layout, stage: Stage, unit: UnitTime) -> float:
    """Waiting of the groups' rounds for each other, none with equal chunks. Backprop has the replay to cover it."""
    largest, smallest = (size(stage.chunks) / stage.blocks for size in (max, min))
    encode = (largest - smallest) * unit.f
    backprop = largest * unit.b - smallest * (unit.f + unit.b)
    groups = layout.micro_batches / layout.pipeline
    return groups * (layout.pipeline - 1) * (encode + max(0.0, backprop))


def text_step(model: ModelConfig, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """(encoding, backward with its replay) of a rank's captions; kept whole where every micro-batch is."""
    forward, backward = text_seconds(model, layout.own_rows, layout.captions_at_once, hardware, layout.element_bytes)
    replay = 0 if layout.keep >= layout.micro_batches else forward
    return forward, replay + backward


def _left_over(text: float, window: float, layout: Layout) -> float:
    return text if layout.pipeline == 1 else max(0.0, text - window / layout.virtual)


def _message_time(model: ModelConfig, layout: Layout, unit: UnitTime, cluster: Cluster) -> float:
    if layout.pipeline == 1:
        return 0.0
    each = cluster.message_seconds(layout, layout.message_bytes(model.vision))
    ways = [each]
    if layout.offload_stash:
        ways.append(layout.message_bytes(model.vision) / (cluster.hardware.pcie_gb_s * 1e9))
    units, chunk = layout.micro_batches * layout.virtual, 1 / layout.virtual
    slow = max(ways)
    left = max(0.0, slow - unit.f * chunk) + max(0.0, slow - (unit.f + unit.b) * chunk)
    rounds = (layout.micro_batches + layout.keep) * (layout.virtual - 1)  # replays hide those of backprop
    return units * left + (rounds + 2 * (layout.pipeline - 1)) * each


def _state_time(
    model: ModelConfig, layout: Layout, stage: Stage, unit: UnitTime, text_backward: float, cluster: Cluster
) -> float:
    text = text_parameters(model)
    buckets = -(-text // BUCKET_ELEMENTS)
    reduce = cluster.collective_seconds(layout, "world", text * FP32, buckets)
    gather = cluster.collective_seconds(layout, "world", text * layout.element_bytes, buckets)
    if layout.overlap:
        # The last stage, which does its captions last, is done (P - 1) b / v before the first.
        slack = (layout.pipeline - 1) * unit.b / layout.virtual - text_backward
        reduce = max(0.0, reduce - max(0.0, slack))
    return vision_state_seconds(model, layout, stage, unit, cluster) + reduce + gather


def vision_state_seconds(model: ModelConfig, layout: Layout, stage: Stage, unit: UnitTime, cluster: Cluster) -> float:
    """Reduction of the image tower's gradients and gathering of its weights that no work hides."""
    elements = stage_parameters(model, layout, stage)
    buckets = -(-elements // BUCKET_ELEMENTS)
    reduce = cluster.collective_seconds(layout, "data", elements * FP32, buckets)
    gather = cluster.collective_seconds(layout, "data", elements * layout.element_bytes, buckets)
    if layout.overlap:
        reduce, gather = max(0.0, reduce - unit.b), max(0.0, gather - unit.f)
    partial = token_gradient_elements(model, stage) * FP32 if layout.splits_tokens else 0
    return reduce + gather + 2 * cluster.collective_seconds(layout, "tensor", partial)


def loss_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """Products in fp32, gathered embeddings and sums, and the rows' way from the last stage and back."""
    rows, batch, width = layout.own_rows, layout.global_batch, model.embed_dim
    hardware = cluster.hardware
    products = LOSS_PRODUCTS * 2 * rows * batch * width / (hardware.fp32_tflops * 1e12 * hardware.gemm_limit)
    gathers = cluster.collective_seconds(layout, "world", 2 * batch * width * FP32 + 2 * batch * FP32, 3)
    sums = 2 * cluster.collective_seconds(layout, "world", 2 * batch * FP32, 3)
    local = layout.local_batch * width * FP32
    dealt = cluster.message_seconds(layout, local) if layout.pipeline > 1 else 0.0
    return products + gathers + sums + dealt + cluster.collective_seconds(layout, "replica", local)


def _optimizer_time(model: ModelConfig, layout: Layout, stage: Stage, hardware: Hardware) -> float:
    vision, text = stage_parameters(model, layout, stage), text_parameters(model)
    return optimizer_seconds(vision / layout.data + text / layout.ranks, vision + text, layout, hardware)


def optimizer_seconds(owned: float, gradients: float, layout: Layout, hardware: Hardware) -> float:
    """Update of the `owned` elements, and zeroing of a rank's fp32 `gradients`."""
    state = owned * (optimizer_bytes_per_element(layout) + FP32) * OPTIMIZER_PASSES
    return (state + gradients * FP32) / hardware.memory_bytes_s


def input_seconds(model: ModelConfig, layout: Layout, rest_s: float, cluster: Cluster, nodes: int) -> float:
    """Pixels of the replica to its GPUs; or, if longer, waiting for the CPUs of the `nodes` that decode."""
    pixels = layout.local_images * 3 * model.vision.image_size**2
    copied = pixels / layout.tensor / (cluster.hardware.pcie_gb_s * 1e9)
    copied += cluster.collective_seconds(layout, "tensor", pixels)
    decoded = layout.global_batch * layout.frames / (nodes * cluster.hardware.decode_images_s)
    return max(copied, decoded - rest_s)
