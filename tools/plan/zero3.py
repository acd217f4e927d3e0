"""ZeRO-3 on the same GPUs, as the paper trained: every GPU computes its own pairs, weights are gathered block by block.

The same formulas, with what the method may use: block checkpoints and one recomputation (4 forwards), two all-gathers
of the weights and one reduce-scatter of bf16 gradients a step, both overlapped with compute. Where the pairs of a GPU
do not fit at once, GradCache (arXiv 2101.06983) cuts them into chunks: encode without grad, then forward and backward a
chunk, which gathers the weights three times a chunk and, with block checkpoints, runs five forwards. Kernels, and the
last blocks that work for the tokens that are read (models/blocks/last_block.py), are those of the layouts it is
compared with.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from models.config import ModelConfig
from tools.cost.activations import (
    FP32,
    locked_forward_bytes,
    micro_batch_saved_bytes,
    text_saved_bytes,
    vision_block_bytes,
    vision_temporary_bytes,
)
from tools.cost.cluster import Cluster
from tools.cost.compute import PassSeconds, stage_seconds, teachers_seconds, text_seconds
from tools.cost.counts import TRAINING_FORWARDS, text_parameters, vision_block_parameters, vision_parameters
from tools.cost.kernels import Kernels
from tools.cost.layout import FrozenModel, Layout, Stage, stages_of, text_above, trained_text_parameters
from tools.cost.loss import loss_bytes
from tools.cost.memory import Memory, optimizer_bytes_per_element, stage_parameters, teacher_bytes
from tools.cost.time import StepTime, input_seconds, loss_seconds, optimizer_seconds
from tools.plan.estimate import Estimate, counted_flops, flops_of_teachers, run_flops

GATHERED_BLOCKS = 2
"""The block at work and the one being gathered."""


@dataclass(frozen=True, kw_only=True)
class Zero3:
    """How a GPU works through its pairs."""

    pairs: int
    """Pairs of a GPU."""
    chunks: int = 1
    checkpoints: bool = True
    """Keep block inputs only, and compute each block again in the backward."""

    @property
    def forwards(self) -> int:
        """Forwards' worth of compute in a step: backward 2, forward 1, recomputation 1, encoding 1."""
        return TRAINING_FORWARDS + self.checkpoints + (self.chunks > 1)

    @property
    def pairs_at_once(self) -> int:
        """Pairs of a chunk."""
        return -(-self.pairs // self.chunks)

    @property
    def gathers(self) -> int:
        """All-gathers of all weights in a step."""
        return (2 if self.chunks == 1 else 3) * self.chunks

    def __str__(self) -> str:
        chunks = f", {self.chunks} chunks (GradCache)" if self.chunks > 1 else ""
        return f"ZeRO-3, {self.pairs} pairs a GPU{chunks}{', block checkpoints' if self.checkpoints else ''}"


def _whole_tower(model: ModelConfig, layout: Layout, zero3: Zero3) -> tuple[Layout, Stage]:
    """A chunk as the micro-batch of a single stage."""
    one = replace(layout, micro_batch=zero3.pairs_at_once * layout.frames)
    return one, stages_of(model, one)[0]


def _trained_parameters(model: ModelConfig, layout: Layout, whole: Stage) -> int:
    return stage_parameters(model, layout, whole.above) + trained_text_parameters(model, layout.freeze)


def zero3_memory(model: ModelConfig, layout: Layout, zero3: Zero3) -> Memory:
    """layout: of one tensor rank and one stage, DP over all GPUs."""
    vision, text = model.vision, model.text
    one, whole = _whole_tower(model, layout, zero3)
    if zero3.checkpoints:
        live = vision_block_bytes(vision, one)
        kept = whole.above.blocks * one.message_bytes(vision) + live
        rows = zero3.pairs_at_once * text.context_length
        text_kept: float = text.depth * rows * text.width * layout.element_bytes
    else:
        kept = micro_batch_saved_bytes(model, one, whole.above)
        text_kept = text_saved_bytes(model, zero3.pairs_at_once, layout.element_bytes, layout.kernels.of_captions)
    if not whole.above.trains:
        kept = 0 if layout.features else locked_forward_bytes(model, one, whole)
    if text_above(model, layout) is None:
        text_kept = 0
    elements, trained = vision_parameters(model) + text_parameters(model), _trained_parameters(model, layout, whole)
    weights, gradients = elements * layout.element_bytes / layout.ranks, trained * FP32 / layout.ranks
    optimizer = trained * optimizer_bytes_per_element(layout) / layout.ranks
    block = vision_block_parameters(vision) * 2
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        stash=0,
        activations=kept + (vision_temporary_bytes(model, one, whole) if whole.above.trains else 0),
        text=text_kept,
        loss=loss_bytes(model, layout),
        buffers=(GATHERED_BLOCKS + 1) * block + zero3.pairs * layout.frames * 3 * vision.image_size**2,
        teachers=teacher_bytes(layout),
    )


def zero3_time(model: ModelConfig, layout: Layout, zero3: Zero3, cluster: Cluster) -> StepTime:
    """Compute of all forwards, and what the gathers and the reduce-scatter take beyond the compute they overlap."""
    one, whole = _whole_tower(model, layout, zero3)
    vision = PassSeconds() if layout.features else stage_seconds(model, one, whole, cluster.hardware)
    above = stage_seconds(model, one, whole.above, cluster.hardware) if whole.above.trains else PassSeconds()
    forward, backward = vision.forward, above.backward
    captions = zero3.pairs, zero3.pairs_at_once, cluster.hardware, layout.element_bytes
    kernels = layout.kernels.of_captions
    text, trained = text_seconds(model, *captions, kernels=kernels), text_above(model, layout)
    text_again = PassSeconds() if trained is None else text_seconds(trained, *captions, kernels=kernels)
    again = zero3.forwards - TRAINING_FORWARDS
    forward_s, backward_s = zero3.chunks * forward, zero3.chunks * backward
    elements = vision_parameters(model) + text_parameters(model)
    own = _trained_parameters(model, layout, whole) / layout.ranks
    blocks = model.vision.depth + model.text.depth
    gather = cluster.collective_seconds(layout, "world", elements * 2, blocks)
    last = backward_s / zero3.chunks + (above.forward if zero3.checkpoints else 0)
    exposed = (zero3.gathers - zero3.chunks) * max(0.0, gather - forward)
    exposed += zero3.chunks * max(0.0, 2 * gather - last)  # one gather, one reduce-scatter of as many bytes
    before = dict(
        compute=forward_s + again * zero3.chunks * above.forward + backward_s,
        tensor=0.0,
        p2p=0.0,
        bubble=0.0,
        text=text.forward + again * text_again.forward + text_again.backward,
        teachers=teachers_seconds(layout, cluster.hardware),
        data=exposed + gather / blocks,
        loss=loss_seconds(model, layout, cluster),
        optimizer=optimizer_seconds(own, own, layout, cluster.hardware),
    )
    return StepTime(**before, input=input_seconds(model, layout, sum(before.values()), cluster, cluster.nodes))


def best_zero3(
    model: ModelConfig,
    cluster: Cluster,
    global_batch: int,
    patch_dropout: float,
    frames: int = 1,
    kernels: Kernels | None = None,
    teachers: tuple[FrozenModel, ...] = (),
    given: Layout | None = None,
) -> Estimate:
    """The fastest form that fits, or the one that needs the least memory. given: what else the layouts have that it is
    compared with.
    """
    pairs = -(-global_batch // cluster.gpus)
    layout = replace(
        given or Layout(global_batch=1, micro_batch=1),
        data=cluster.gpus,
        global_batch=global_batch,
        micro_batch=pairs * frames,
        frames=frames,
        patch_dropout=patch_dropout,
        kernels=kernels or Kernels(),
        teachers=teachers,
    )
    found = list(_forms(model, cluster, layout, pairs))
    fitting = [form for form in found if form.fits]
    return min(fitting, key=lambda e: e.time.total) if fitting else min(found, key=lambda e: e.memory.total)


def _forms(model: ModelConfig, cluster: Cluster, layout: Layout, pairs: int) -> Iterator[Estimate]:
    taught = flops_of_teachers(model, layout)
    images = layout.global_batch * layout.frames
    for chunks in (n for n in range(1, pairs + 1) if pairs % n == 0):
        for checkpoints in (True, False):
            zero3 = Zero3(pairs=pairs, chunks=chunks, checkpoints=checkpoints)
            time = zero3_time(model, layout, zero3, cluster)
            yield Estimate(
                name=str(zero3),
                memory=zero3_memory(model, layout, zero3),
                time=time,
                cluster=cluster,
                global_batch=layout.global_batch,
                model_flops=counted_flops(model, layout) + taught,
                executed_flops=run_flops(model, layout, zero3.forwards) + taught,
                images_per_node_s=0 if layout.features else images / time.total / cluster.nodes,
            )
