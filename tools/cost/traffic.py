"""Every collective and message of a rank in one step: axis, kind, how often, bytes put in. From the code, by formula.

Bytes are what a rank hands over, as engine/parallel/traffic.py counts them: its own slice for an all-gather, everything
for an all-reduce and a reduce-scatter, the message for a send, the tensor for a broadcast that it starts. Buckets of
gradients and weights are counted without megatron-core's padding to multiples of 128 x DP elements.

Of tensor parallelism, X = T H elements, a block with one column-parallel linear before attention and one in the MLP:
- sequence parallelism: forward 2 all-gathers, 2 reduce-scatters; backward 4 and 2, since megatron-core gathers the
  inputs of the column-parallel linears again for the weight gradients instead of keeping them;
- without it: 2 all-reduces forward, 2 backward;
- a pass that is repeated has none in front of qkv or fc1, and none behind fc2 or proj, whose outputs were kept.
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
from models.tensors.kept import LEVELS
from tools.cost.activations import FP32, output_levels
from tools.cost.counts import text_parameters
from tools.cost.layout import Layout, Stage, trained_text_parameters, trains_images
from tools.cost.loss import IDENTIFIER
from tools.cost.memory import single_chunks, stage_parameters

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
    """all-gather | reduce-scatter | all-to-all | all-reduce | broadcast | scatter | send."""
    count: int
    sent_bytes: float
    """Put in by this rank, over all `count`."""

    def wire_bytes(self, ranks: int) -> float:
        """What leaves a rank of a ring of `ranks`."""
        part = (ranks - 1) / ranks
        share = {"all-reduce": 2 * part, "all-gather": ranks - 1}
        share |= dict.fromkeys(("reduce-scatter", "all-to-all", "scatter"), part)
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
        *optimizer_traffic(model, layout, stage),
    ]
    return [entry for entry in everything if entry.count and axis_size(layout, entry.axis) > 1]


def tensor_traffic(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """The blocks' collectives over the tensor axis: m - k replays of what is trained, and one more forward of it with
    full recomputation.
    """
    vision, m, above = model.vision, layout.micro_batches, stage.above
    if layout.features:
        return []
    replays = m - layout.keep
    again = replays + (m if layout.recompute == "full" else 0)
    found = []
    for what, passes, of_blocks in (
        ("tensor forward", m, stage_collectives(block_forward_collectives, vision, layout, stage)),
        ("tensor forward", again, stage_collectives(block_forward_collectives, vision, layout, above)),
        ("tensor forward", -again, spared_collectives(model, layout, above)),
        ("tensor backward", m, stage_collectives(block_backward_collectives, vision, layout, above)),
        ("tensor backward", -m * above.reads_no_gradient, _input_gradient_collectives(vision, layout)),
    ):
        for kind, (count, sent) in of_blocks.items():
            found.append(Traffic(what=what, axis="tensor", kind=kind, count=count * passes, sent_bytes=sent * passes))
    if stage.has_head and layout.splits_tokens:
        passes = m + replays * above.has_head
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


def spared_collectives(model: ModelConfig, layout: Layout, stage: Stage) -> Collectives:
    """Collectives that a repeated pass through a stage has no need of, since outputs of products were kept."""
    if layout.tensor == 1 or not layout.keeps_outputs:
        return {}
    *levels, _ = output_levels(model, layout, stage)
    total: Collectives = {}
    for number, (blocks, level) in enumerate(zip(stage.chunks, levels, strict=True)):
        ends = stage.last_blocks if number == len(stage.chunks) - 1 else 0
        for is_last, times in ((False, blocks - ends), (model.vision.reads_one_token, ends)):
            for product in LEVELS[level]:
                kind, count, each = _beside(product, model.vision, layout, is_last)
                have, bytes_so_far = total.get(kind, (0, 0.0))
                total[kind] = have + times * count, bytes_so_far + times * each
    return total


def _beside(product: str, vision: VisionConfig, layout: Layout, is_last: bool) -> tuple[str, int, float]:
    """The collectives of a product of a block's forward: (kind, how many, bytes put in)."""
    before, behind = _stream_bytes(vision, layout, is_last)
    if product in ("fc2", "proj"):
        return ("reduce-scatter" if layout.splits_tokens else "all-reduce"), 1, behind
    qkv, mlp = column_linears(vision)
    count, stream = (qkv, before) if product == "qkv" else (mlp, behind)
    return "all-gather", count * layout.splits_tokens, count * layout.splits_tokens * stream / layout.tensor


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


def _input_gradient_collectives(vision: VisionConfig, layout: Layout) -> Collectives:
    """Those that bring the gradient of a block's input together."""
    (qkv, _), (before, _) = column_linears(vision), _stream_bytes(vision, layout, is_last=False)
    return {"reduce-scatter" if layout.splits_tokens else "all-reduce": (qkv, qkv * before)}


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
    if layout.features:
        return []
    messages = layout.micro_batches * (len(stage.chunks) - stage.has_head + stage.above.returned_gradients)
    sent = messages * layout.message_bytes(model.vision)
    return [Traffic(what="stages", axis="pipeline", kind="send", count=messages, sent_bytes=sent)]


def state_traffic(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """Gradients reduced (fp32: scattered; bf16: sent to their owners), weights gathered: vision over DP, text over all.

    Counts are per tower: the number of buckets follows from parallel.bucket_size. Where weights are sharded all that
    runs is gathered, and once more what is repeated; with neighbours that gather among themselves as if all did.
    """
    found = []
    kind = "reduce-scatter" if layout.reduce_dtype == "fp32" else "all-to-all"
    vision, of_text = gathered_elements(model, layout, stage)
    for axis, trained, gathered in (
        ("data", stage_parameters(model, layout, stage.above), vision),
        ("world", trained_text_parameters(model, layout.freeze), of_text),
    ):
        sent = gathered * layout.element_bytes / axis_size(layout, axis)
        found += [
            Traffic(
                what="gradients", axis=axis, kind=kind, count=trained > 0, sent_bytes=trained * layout.reduced_bytes
            ),
            Traffic(what="weights", axis=axis, kind="all-gather", count=gathered > 0, sent_bytes=sent),
        ]
    if layout.splits_tokens:
        owners = layout.data if layout.shard != "optimizer" else 1  # of slices, of which a rank sums its own
        partial = token_gradient_elements(model, stage.above) * FP32 / owners
        found.append(Traffic(what="gradients", axis="tensor", kind="all-reduce", count=partial > 0, sent_bytes=partial))
    return found


def gathered_elements(model: ModelConfig, layout: Layout, stage: Stage) -> tuple[int, int]:
    """(vision, captions): elements that a rank of this stage gathers in a step, its owned ones included."""
    trained, of_text = stage_parameters(model, layout, stage.above), trained_text_parameters(model, layout.freeze)
    if layout.shard != "weights":
        return trained, of_text
    again = sum(stage_parameters(model, layout, chunk) for chunk in single_chunks(stage) if chunk.above.trains)
    once = 0 if layout.features else stage_parameters(model, layout, stage)
    text = text_parameters(model)
    return once + again, text + (text if of_text else 0)


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
    pixels = width if layout.features else 3 * layout.frames * model.vision.image_size**2
    ids = (model.text.context_length + 2 * layout.has_picture_ids) * FP32
    entry = Traffic
    found = [*_loss_traffic(model, layout), *_taught_traffic(model, layout)]
    if trains_images(model, layout):
        found.append(entry(what="rows", axis="replica", kind="all-gather", count=1, sent_bytes=own * width))
    if stage.has_head and not layout.features:
        sent = layout.local_batch * width
        found.append(entry(what="rows", axis="pipeline", kind="broadcast", count=1, sent_bytes=sent))
    if stage.has_embedding and (layout.features or layout.teachers):
        sent = layout.pipeline * own * pixels
        found.append(entry(what="rows", axis="pipeline", kind="scatter", count=1, sent_bytes=sent))
    if stage.has_embedding:
        share = -(-layout.local_batch // layout.tensor)
        found += [
            entry(what="data", axis="tensor", kind="all-gather", count=1, sent_bytes=share * pixels),
            entry(what="data", axis="replica", kind="broadcast", count=1, sent_bytes=share * ids),
        ]
    return found


def _loss_traffic(model: ModelConfig, layout: Layout) -> list[Traffic]:
    """Rows of both towers; of a softmax normalisers and sums over columns, of a sigmoid their maximum; a width each,
    and twice the whole one of a teacher whose captions meet the student's images. Each asks for the identifiers of
    false negatives.
    """
    own, batch, rows = layout.own_rows, layout.global_batch, 2 * layout.own_rows * FP32
    crossed = 2 * sum(one.interactive for one in layout.teachers)
    widths = (*layout.loss_widths(model), *[model.embed_dim] * crossed)
    times = len(widths)
    copies = Traffic(
        what="loss",
        axis="world",
        kind="all-gather",
        count=times * (layout.copies > 0),
        sent_bytes=times * own * layout.copies * IDENTIFIER,
    )
    towers = Traffic(what="loss", axis="world", kind="all-gather", count=2 * times, sent_bytes=sum(widths) * rows)
    if layout.loss_variant == "ring":
        rounds = RING_ROUNDS[layout.loss] * (layout.ranks - 1)
        sent = rounds * own * FP32 * sum(widths)
        towers = Traffic(what="loss", axis="world", kind="send", count=rounds * times, sent_bytes=sent)
    if layout.loss == "sigmoid":
        return [
            towers,
            copies,
            Traffic(
                what="loss", axis="world", kind="all-reduce", count=2 * times, sent_bytes=times * (batch + 5) * FP32
            ),
        ]
    return [
        towers,
        copies,
        Traffic(what="loss", axis="world", kind="all-gather", count=times, sent_bytes=times * rows),
        Traffic(
            what="loss", axis="world", kind="all-reduce", count=3 * times, sent_bytes=times * (2 * batch + 4) * FP32
        ),
    ]


def _taught_traffic(model: ModelConfig, layout: Layout) -> list[Traffic]:
    """Traffic of teachers' other losses: the sum of distances; of the relational one rows of student and teacher side
    by side, two normalisers and sums of each, and the identifiers of false negatives once more.
    """
    own, batch, found = layout.own_rows, layout.global_batch, []
    for one in layout.teachers:
        if one.feature:
            found.append(Traffic(what="loss", axis="world", kind="all-reduce", count=1, sent_bytes=FP32))
        if not one.relational:
            continue
        rows = own * (model.embed_dim + one.model.embed_dim) * FP32
        small = 4 * own * FP32 + own * layout.copies * IDENTIFIER
        count = 1 + (layout.copies > 0)
        if layout.loss_variant == "ring":
            rounds = RING_ROUNDS["softmax"] * (layout.ranks - 1)
            found.append(Traffic(what="loss", axis="world", kind="send", count=rounds, sent_bytes=rounds * rows))
        else:
            count, small = count + 2, small + 2 * rows
        sums = (4 * batch + 2) * FP32
        found += [
            Traffic(what="loss", axis="world", kind="all-gather", count=count, sent_bytes=small),
            Traffic(what="loss", axis="world", kind="all-reduce", count=5, sent_bytes=sums),
        ]
    return found


def optimizer_traffic(model: ModelConfig, layout: Layout, stage: Stage) -> list[Traffic]:
    """The gradient norm with a count, and LAMB's norms of each logical tensor and update, in float64, of parts with
    something to train (engine/parallel/shards.py).
    """
    found = [Traffic(what="optimizer", axis="world", kind="all-reduce", count=1, sent_bytes=2 * FP64)]
    if layout.optimizer != "lamb":
        return found
    chunks = [chunk for chunk in single_chunks(stage) if chunk.above.trains]
    of_vision = 2 * FP64 * sum(vision_tensors(model, chunk) for chunk in chunks)
    of_text = 2 * FP64 * len(text_shapes(model)) if trained_text_parameters(model, layout.freeze) else 0
    return [
        *found,
        Traffic(what="optimizer", axis="world", kind="all-reduce", count=of_text > 0, sent_bytes=of_text),
        Traffic(what="optimizer", axis="stage", kind="all-reduce", count=len(chunks), sent_bytes=of_vision),
    ]


def vision_tensors(model: ModelConfig, stage: Stage) -> int:
    """Logical tensors of the image tower on this stage."""
    embedding = len(vision_embedding_shapes(model.vision)) if stage.has_embedding else 0
    head = len(vision_head_shapes(model)) if stage.has_head else 0
    return stage.blocks * len(vision_block_shapes(model.vision)) + embedding + head
