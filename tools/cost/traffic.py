"""Every collective and message of a rank in one step: axis, kind, how often, bytes put in. From the code, by formula.

Bytes are what a rank hands over, as engine/parallel/traffic.py counts them: its own slice for an all-gather, everything
for an all-reduce and a reduce-scatter, the message for a send, the tensor for a broadcast that it starts. Buckets of
gradients and weights are counted without megatron-core's padding to multiples of 128 x DP elements.

Of tensor parallelism, X = T H elements, a block with one column-parallel linear before attention and one in the MLP:
- sequence parallelism: forward 2 all-gathers, 2 reduce-scatters; backward 4 and 2, since megatron-core gathers the
  inputs of the column-parallel linears again for the weight gradients instead of keeping them;
- without it: 2 all-reduces forward, 2 backward.
In the last block what is behind the attention has R pooled rows instead of T; sequence parallelism deals them out with
one more reduce-scatter (all-gather backward) and gathers them for the head.
A sub-LN norm gathers the split channels, forward and backward; a norm of q and k adds two numbers a token up.
"""

from collections.abc import Callable
from dataclasses import dataclass

from models.config import ModelConfig, VisionConfig
from models.tensors.inventory import (
    block_split_dim,
    elements,
    text_shapes,
    vision_block_shapes,
    vision_embedding_shapes,
    vision_head_shapes,
)
from tools.cost.activations import FP32
from tools.cost.counts import text_parameters
from tools.cost.layout import Layout, Stage
from tools.cost.memory import stage_parameters

FP64 = 8
RING_ROUNDS = {"softmax": 3, "sigmoid": 2}
"""Times that a tower's blocks travel round: captions for each pass over the own pictures, pictures once."""
_SEEN_WHOLE = ("attn.norm.", "mlp.norm.")
"""Sub-LN norms see gathered rows: each tensor rank has their whole gradient."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives or messages of one sort on one rank in one step."""

    what: str
    """tensor forward | tensor backward | stages | gradients | weights | loss | rows | optimizer | data."""
    axis: str
    """tensor | pipeline | data | replica | stage | world."""
    kind: str
    """all-gather | reduce-scatter | all-to-all | all-reduce | broadcast | send."""
    count: int
    sent_bytes: float
    """Put in by this rank, over all `count`."""

    def wire_bytes(self, ranks: int) -> float:
        """What leaves a rank of a ring of `ranks`."""
        part = (ranks - 1) / ranks
        share = {"all-reduce": 2 * part, "reduce-scatter": part, "all-to-all": part, "all-gather": ranks - 1}
        return self.sent_bytes * share.get(self.kind, 1) if ranks > 1 else 0


def axis_size(layout: Layout, axis: str) -> int:
    """Ranks of a group of this axis."""
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "replica": layout.replica,
        "stage": layout.tensor * layout.data,
        "world": layout.ranks,
    }
    return sizes[axis]


def step_traffic(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """Traffic of a rank of this stage; axes of one rank are left out."""
    everything = [
        *tensor_traffic(model, layout, stage),
        *stage_messages(model, layout, stage),
        *state_traffic(model, layout, stage),
        *row_traffic(model, layout, stage),
        *optimizer_traffic(model, stage),
    ]
    return [entry for entry in everything if entry.count and axis_size(layout, entry.axis) > 1]


def tensor_traffic(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """The blocks' collectives over the tensor axis: m - k replays, and one more forward with full recomputation."""
    vision, m = model.vision, layout.micro_batches
    forwards = m + (m - layout.keep) + (m if layout.recompute == "full" else 0)
    found = []
    for what, passes, of_blocks in (
        ("tensor forward", forwards, stage_collectives(block_forward_collectives, vision, layout, stage)),
        ("tensor backward", m, stage_collectives(block_backward_collectives, vision, layout, stage)),
    ):
        for kind, (count, sent) in of_blocks.items():
            found.append(Traffic(what=what, axis="tensor", kind=kind, count=count * passes, sent_bytes=sent * passes))
    if stage.has_head and layout.splits_tokens:
        passes = 2 * m - layout.keep
        rows = layout.pooled_rows if vision.reads_one_token else layout.packed_tokens(vision)
        each = rows * vision.width * layout.element_bytes / layout.tensor
        found.append(
            Traffic(what="tensor forward", axis="tensor", kind="all-gather", count=passes, sent_bytes=passes * each)
        )
    return found


Collectives = dict[str, tuple[int, float]]
"""kind -> (how many, bytes put in by all of them)."""


def stage_collectives(
    of_block: Callable[[VisionConfig, Layout, bool], Collectives], vision: VisionConfig, layout: Layout, stage: Stage
) -> Collectives:
    """Collectives of one micro-batch through the blocks of a stage. of_block: one of the two functions below."""
    total: Collectives = {}
    for is_last, times in ((False, stage.whole_blocks), (vision.reads_one_token, stage.last_blocks)):
        for kind, (count, sent) in of_block(vision, layout, is_last).items():
            have, bytes_so_far = total.get(kind, (0, 0.0))
            total[kind] = have + times * count, bytes_so_far + times * sent
    return total


def block_forward_collectives(vision: VisionConfig, layout: Layout, is_last: bool) -> Collectives:
    """Collectives of one block's forward of one micro-batch; is_last: of the tower."""
    before, behind = _stream_bytes(vision, layout, is_last)
    norms, normed = _sub_norms(vision, layout, is_last)
    sums, summed = _qk_sums(vision, layout)
    if not layout.splits_tokens:
        return {"all-reduce": (2 + sums, 2 * behind + summed), "all-gather": (norms, normed)}
    qkv, mlp = column_linears(vision)
    gathered = (qkv * before + mlp * behind) / layout.tensor
    scattered = 2 + is_last
    return {
        "all-gather": (qkv + mlp + norms, gathered + normed),
        "reduce-scatter": (scattered, scattered * behind),
        "all-reduce": (sums, summed),
    }


def block_backward_collectives(vision: VisionConfig, layout: Layout, is_last: bool) -> Collectives:
    """The same of its backward."""
    before, behind = _stream_bytes(vision, layout, is_last)
    norms, normed = _sub_norms(vision, layout, is_last)
    qkv, mlp = column_linears(vision)
    of_inputs = qkv * before + mlp * behind
    sums, summed = _qk_sums(vision, layout)
    if not layout.splits_tokens:
        return {"all-reduce": (qkv + mlp + sums, of_inputs + summed), "all-gather": (norms, normed)}
    of_outputs = 2 + is_last
    gathered = (of_inputs + of_outputs * behind) / layout.tensor
    return {
        "all-gather": (qkv + mlp + of_outputs + norms, gathered + normed),
        "reduce-scatter": (qkv + mlp, of_inputs),
        "all-reduce": (sums, summed),
    }


def _stream_bytes(vision: VisionConfig, layout: Layout, is_last: bool) -> tuple[float, float]:
    """The residual stream of a micro-batch, whole, in front of the attention and behind it."""
    row, tokens = vision.width * layout.element_bytes, layout.packed_tokens(vision)
    return tokens * row, (layout.pooled_rows if is_last else tokens) * row


def _sub_norms(vision: VisionConfig, layout: Layout, is_last: bool) -> tuple[int, float]:
    """All-gathers of the sub-LN norms, which normalise over channels that are split, and their bytes."""
    channels = [vision.width] * vision.attention_norm + [vision.mlp_hidden] * vision.mlp_norm
    rows = layout.pooled_rows if is_last else layout.packed_tokens(vision)
    return len(channels), sum(channels) * rows * layout.element_bytes / layout.tensor


def _qk_sums(vision: VisionConfig, layout: Layout) -> tuple[int, float]:
    """All-reduces of the norm of q and k, and their bytes."""
    return int(vision.qk_norm), vision.qk_norm * 2 * layout.packed_tokens(vision) * FP32


def column_linears(vision: VisionConfig) -> tuple[int, int]:
    """Column-parallel linears before the attention and in the MLP."""
    return 3 if vision.separate_qkv else 1, 2 if vision.mlp == "swiglu" else 1


def stage_messages(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """Activations to the next stage, gradients to the previous one: one message a micro-batch and chunk border."""
    m, chunks = layout.micro_batches, len(stage.chunks)
    messages = m * (chunks - stage.has_head) + m * (chunks - stage.has_embedding)
    sent = messages * layout.message_bytes(model.vision)
    return [Traffic(what="stages", axis="pipeline", kind="send", count=messages, sent_bytes=sent)]


def state_traffic(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """Gradients reduced (fp32: scattered; bf16: sent to their owners), weights gathered: vision over DP, text over all.

    Counts are per tower: the number of buckets follows from parallel.bucket_size.
    """
    found = []
    kind = "reduce-scatter" if layout.reduce_dtype == "fp32" else "all-to-all"
    for axis, count in (("data", stage_parameters(model, layout, stage)), ("world", text_parameters(model))):
        ranks = axis_size(layout, axis)
        found += [
            Traffic(what="gradients", axis=axis, kind=kind, count=1, sent_bytes=count * layout.reduced_bytes),
            Traffic(
                what="weights",
                axis=axis,
                kind="all-gather",
                count=1,
                sent_bytes=count * layout.element_bytes / ranks,
            ),
        ]
    if layout.splits_tokens:
        partial = token_gradient_elements(model, stage) * FP32
        found.append(Traffic(what="gradients", axis="tensor", kind="all-reduce", count=1, sent_bytes=partial))
    return found


def token_gradient_elements(model: ModelConfig, stage: Stage) -> int:
    """Elements whose gradients a tensor rank has of its own tokens only: norms, row biases, the embedding."""
    shapes = vision_block_shapes(model.vision)
    whole = {n: s for n, s in shapes.items() if block_split_dim(n) is None and not n.startswith(_SEEN_WHOLE)}
    embedding = elements(vision_embedding_shapes(model.vision))
    return stage.blocks * elements(whole) + (embedding if stage.has_embedding else 0)


def row_traffic(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """Embeddings, their gradients, the loss, and the batch itself (engine/parallel/rows.py,
    engine/objectives/contrastive/softmax.py, engine/feed.py).
    """
    width, own = model.embed_dim * FP32, layout.own_rows
    pixels = 3 * layout.frames * model.vision.image_size**2
    ids = model.text.context_length * FP32
    entry = Traffic
    found = [
        *_loss_traffic(model, layout),
        entry(what="rows", axis="replica", kind="all-gather", count=1, sent_bytes=own * width),
    ]
    if stage.has_head:
        sent = layout.local_batch * width
        found.append(entry(what="rows", axis="pipeline", kind="broadcast", count=1, sent_bytes=sent))
    if stage.has_embedding:
        share = -(-layout.local_batch // layout.tensor)
        found += [
            entry(what="data", axis="tensor", kind="all-gather", count=2, sent_bytes=share * (pixels + ids)),
            entry(what="data", axis="pipeline", kind="broadcast", count=1, sent_bytes=layout.local_batch * ids),
        ]
    return found


def _loss_traffic(model: ModelConfig, layout: Layout) -> list[Traffic]:
    """Rows of both towers; of a softmax normalisers and sums over columns, of a sigmoid their maximum; a width each."""
    own, batch, widths = layout.own_rows, layout.global_batch, layout.loss_widths(model)
    times, rows = len(widths), 2 * own * FP32
    towers = Traffic(what="loss", axis="world", kind="all-gather", count=2 * times, sent_bytes=sum(widths) * rows)
    if layout.loss_variant == "ring":
        rounds = RING_ROUNDS[layout.loss] * (layout.ranks - 1)
        sent = rounds * own * FP32 * sum(widths)
        towers = Traffic(what="loss", axis="world", kind="send", count=rounds * times, sent_bytes=sent)
    if layout.loss == "sigmoid":
        return [
            towers,
            Traffic(
                what="loss", axis="world", kind="all-reduce", count=2 * times, sent_bytes=times * (batch + 5) * FP32
            ),
        ]
    return [
        towers,
        Traffic(what="loss", axis="world", kind="all-gather", count=times, sent_bytes=times * rows),
        Traffic(
            what="loss", axis="world", kind="all-reduce", count=3 * times, sent_bytes=times * (2 * batch + 4) * FP32
        ),
    ]


def optimizer_traffic(model: ModelConfig, stage: Stage) -> list[Traffic]:
    """The gradient norm with a count, and LAMB's norms of each logical tensor and update, in float64
    (engine/parallel/shards.py).
    """
    vision = 2 * FP64 * vision_tensors(model, stage)
    text = 2 * FP64 * len(text_shapes(model))
    return [
        Traffic(what="optimizer", axis="world", kind="all-reduce", count=2, sent_bytes=2 * FP64 + text),
        Traffic(what="optimizer", axis="stage", kind="all-reduce", count=len(stage.chunks), sent_bytes=vision),
    ]


def vision_tensors(model: ModelConfig, stage: Stage) -> int:
    """Logical tensors of the image tower on this stage."""
    embedding = len(vision_embedding_shapes(model.vision)) if stage.has_embedding else 0
    head = len(vision_head_shapes(model)) if stage.has_head else 0
    return stage.blocks * len(vision_block_shapes(model.vision)) + embedding + head
