"""ZeRO-3 on the same GPUs, as the paper trained: every GPU computes its own pairs, weights are gathered block by block.

The same formulas, with what the method may use: block checkpoints and one recomputation (4 forwards), two all-gathers
of the weights and one reduce-scatter of bf16 gradients a step, both overlapped with compute. Where the pairs of a GPU
do not fit at once, GradCache (arXiv 2101.06983) cuts them into chunks: encode without grad, then forward and backward a
chunk, which gathers the weights three times a chunk and, with block checkpoints, runs five forwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from models.config import ModelConfig
from tools.planning.activations import backward_temporary_bytes, block_saved_bytes
from tools.planning.cluster import Cluster
from tools.planning.compute import stage_seconds, text_seconds
from tools.planning.counts import text_parameters, training_flops, vision_block_parameters, vision_parameters
from tools.planning.estimate import Estimate
from tools.planning.layout import Layout, Stage, text_blocks
from tools.planning.memory import Memory, loss_bytes
from tools.planning.time import StepTime, input_seconds, loss_seconds, optimizer_seconds

STATE_BYTES = (2, 4, 12)
"""bf16 weight; fp32 gradient; fp32 master, m and v: of each element, sharded over all GPUs."""
GATHERED_BLOCKS = 2
"""The block at work and the one being gathered."""


@dataclass(frozen=True, kw_only=True)
class Zero3:
    """How a GPU works through its pairs."""

    pairs: int
    """Of a GPU."""
    chunks: int = 1
    checkpoints: bool = True
    """Keep block inputs only, and compute each block again in the backward."""

    @property
    def forwards(self) -> int:
        """Forwards' worth of compute in a step: backward 2, forward 1, recomputation 1, encoding 1."""
        return 3 + self.checkpoints + (self.chunks > 1)

    @property
    def gathers(self) -> int:
        """All-gathers of all weights in a step."""
        return (2 if self.chunks == 1 else 3) * self.chunks

    def __str__(self) -> str:
        chunks = f", {self.chunks} chunks (GradCache)" if self.chunks > 1 else ""
        return f"ZeRO-3, {self.pairs} pairs a GPU{chunks}{', block checkpoints' if self.checkpoints else ''}"


def zero3_memory(model: ModelConfig, layout: Layout, zero3: Zero3) -> Memory:
    """layout: of one tensor rank and one stage, DP over all GPUs."""
    vision, text = model.vision, model.text
    samples = -(-zero3.pairs // zero3.chunks)
    tokens = samples * layout.frames * vision.kept_tokens(layout.patch_dropout)
    one = block_saved_bytes(vision, tokens, element=2)
    kept = vision.depth * (tokens * vision.width * 2 if zero3.checkpoints else one)
    live = one if zero3.checkpoints else 0
    live += backward_temporary_bytes(vision, tokens, element=2, tensor=1, splits_tokens=False)
    captions = samples * text.context_length
    caption_block = block_saved_bytes(text_blocks(text), captions, element=2)
    text_kept = text.depth * (captions * text.width * 2 if zero3.checkpoints else caption_block)
    weights, gradients, optimizer = (
        (vision_parameters(model) + text_parameters(model)) * each / layout.ranks for each in STATE_BYTES
    )
    block = vision_block_parameters(vision) * 2
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        stash=0,
        activations=kept + live,
        text=text_kept,
        loss=loss_bytes(model, layout),
        buffers=(GATHERED_BLOCKS + 1) * block + zero3.pairs * layout.frames * 3 * vision.image_size**2,
    )


def zero3_time(model: ModelConfig, layout: Layout, zero3: Zero3, cluster: Cluster) -> StepTime:
    """Compute of all forwards, and what the gathers and the reduce-scatter take beyond the compute they overlap."""
    samples = -(-zero3.pairs // zero3.chunks)
    whole = Stage(rank=0, chunks=(model.vision.depth,), has_embedding=True, has_head=True)
    one = replace(layout, micro_batch=samples * layout.frames)
    forward, backward = stage_seconds(model, one, whole, cluster.hardware)
    text_forward, text_backward = text_seconds(model, zero3.pairs, samples, cluster.hardware, layout.element_bytes)
    again = zero3.forwards - 3
    forward_s, backward_s = zero3.chunks * forward, zero3.chunks * backward
    elements = vision_parameters(model) + text_parameters(model)
    blocks = model.vision.depth + model.text.depth
    gather = cluster.collective_seconds(layout, "world", elements * 2, blocks)
    last = backward_s / zero3.chunks + (forward if zero3.checkpoints else 0)
    exposed = (zero3.gathers - zero3.chunks) * max(0.0, gather - forward)
    exposed += zero3.chunks * max(0.0, 2 * gather - last)  # one gather, one reduce-scatter of as many bytes
    before = dict(
        compute=(1 + again) * forward_s + backward_s,
        tensor=0.0,
        p2p=0.0,
        bubble=0.0,
        text=(1 + again) * text_forward + text_backward,
        data=exposed + gather / blocks,
        loss=loss_seconds(model, layout, cluster),
        optimizer=optimizer_seconds(elements / layout.ranks, elements / layout.ranks, layout, cluster.hardware),
    )
    return StepTime(**before, input=input_seconds(model, layout, sum(before.values()), cluster, cluster.nodes))


def best_zero3(
    model: ModelConfig, cluster: Cluster, global_batch: int, patch_dropout: float, frames: int = 1
) -> Estimate:
    """The fastest form that fits, or the one that needs the least memory."""
    pairs = -(-global_batch // cluster.gpus)
    layout = Layout(
        data=cluster.gpus,
        global_batch=global_batch,
        micro_batch=pairs * frames,
        frames=frames,
        patch_dropout=patch_dropout,
    )
    found = list(_forms(model, cluster, layout, pairs))
    fitting = [form for form in found if form.fits]
    return min(fitting, key=lambda e: e.time.total) if fitting else min(found, key=lambda e: e.memory.total)


def _forms(model: ModelConfig, cluster: Cluster, layout: Layout, pairs: int) -> Iterator[Estimate]:
    flops = training_flops(model, layout.patch_dropout, layout.frames)
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
                model_flops=flops,
                executed_flops=flops * zero3.forwards / 3,
                images_per_node_s=layout.global_batch * layout.frames / time.total / cluster.nodes,
            )
