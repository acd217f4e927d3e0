"""Memory of the fullest rank at the fullest moment of a step, by part. Bytes.

What lies there all the time: weights, their fp32 gradients (whole on each rank: megatron-core's buffers), and the
optimizer's fp32 master, moments and average of the owned elements (vision over DP, text over all ranks). Where more is
sharded only the owned elements stay; a part is whole in its turn and the next one is gathered, the one before it
reduced meanwhile (engine/pipeline/executor.py, engine/parallel/sharded.py). On top, by phase:
- encode: the stash, k kept micro-batches, what the forward of the last one needs; then, on the first stage, what the
  captions' encoding needs: the others encode theirs before the first image;
- loss: the stash, k kept micro-batches, the gathered embeddings of one tower;
- captions' backward, before the first gradient arrives: the stash, k kept, the captions of one pass; the last stage
  has it at the end, when stash and kept activations are gone;
- backprop: the stash, k kept or the chunk that is replayed if that is more, what a block's forward or backward needs.
Kept outputs lie there from their encoding to their replay; in host memory only those on their way count.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

from engine.config.sections.optim import MOMENTS
from models.config import ModelConfig
from models.tensors.inventory import (
    block_split_dim,
    elements,
    vision_block_shapes,
    vision_embedding_shapes,
    vision_head_shapes,
)
from tools.cost.activations import (
    FP32,
    backward_temporary_bytes,
    locked_forward_bytes,
    micro_batch_saved_bytes,
    output_levels,
    outputs_bytes,
    pass_output_bytes,
    text_forward_temporary_bytes,
    text_saved_bytes,
    text_stream_bytes,
    vision_forward_temporary_bytes,
    vision_temporary_bytes,
)
from tools.cost.counts import text_parameters, vision_parameters
from tools.cost.layout import (
    BYTES,
    FrozenModel,
    Layout,
    Stage,
    frozen_in,
    kernels_of,
    stages_of,
    telling_stages,
    text_above,
    text_blocks,
    trained_text_parameters,
)
from tools.cost.loss import loss_bytes

OFFLOADED_INPUTS_HERE = 2
MESSAGES_UNDER_WAY = 4
"""A receive posted ahead, the gradient at work, two sends that have not left (engine/pipeline/p2p.py)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its peak."""

    weights: float
    """Vision."""
    gradients: float
    """Vision."""
    optimizer: float
    """Vision."""
    stash: float
    """Stage inputs of the local batch."""
    outputs: float = 0.0
    """Kept outputs of products, of all micro-batches that are replayed."""
    activations: float
    """Vision: kept or replayed, and what a backward needs beyond them."""
    text: float
    """The caption tower: weights, gradients, optimizer, and its activations where they are part of the peak."""
    loss: float
    """Embeddings, their gradients, tiles."""
    buffers: float
    """Messages, gathered tokens, pixels."""
    teachers: float = 0.0
    """Weights of frozen CLIPs."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def stage_parameters(model: ModelConfig, layout: Layout, stage: Stage) -> int:
    """Elements of the vision tower on one tensor rank of this stage."""
    embedding, head = _end_parameters(model)
    blocks = stage.blocks * block_parameters(model, layout.tensor)
    return blocks + stage.has_embedding * embedding + stage.has_head * head


@cache
def _end_parameters(model: ModelConfig) -> tuple[int, int]:
    """Elements of the embedding and of the head."""
    return elements(vision_embedding_shapes(model.vision)), elements(vision_head_shapes(model))


@cache
def block_parameters(model: ModelConfig, tensor: int) -> int:
    """Elements of one block on one tensor rank: projections and their column biases are split, the rest is whole."""
    shapes = vision_block_shapes(model.vision)
    split = {name: shape for name, shape in shapes.items() if block_split_dim(name) is not None}
    return elements(split) // tensor + elements({n: s for n, s in shapes.items() if n not in split})


def optimizer_bytes_per_element(layout: Layout) -> int:
    """What the optimizer keeps, the average, and a master where the weights are not fp32 themselves.

    LAMB needs no room beside it: its direction is written over the gradient (engine/optim/lamb.py).
    """
    return FP32 * (len(MOMENTS[layout.optimizer]) + layout.averages + (layout.precision != "fp32"))


def state_bytes(
    layout: Layout, elements: int, owners: int, gathering: int, trained: int | None = None
) -> tuple[float, float, float]:
    """Weights, gradients and optimizer of `elements` that always lie there, the last sharded over `owners` ranks.

    gathering: ranks that hold sharded weights once among them. trained: elements with gradients; None: all.
    """
    trained = elements if trained is None else trained
    optimizer = trained * optimizer_bytes_per_element(layout) / owners
    weights: float = elements * layout.element_bytes
    if layout.shard == "optimizer" or owners == 1:
        return weights, trained * FP32, optimizer
    if layout.shard == "weights":
        # Of the neighbours' slices in other groups there is a copy, beside the own one.
        weights *= 1 / owners + (1 / gathering if gathering < owners else 0)
    return weights, trained * FP32 / owners, optimizer


@dataclass(frozen=True, kw_only=True)
class Visitors:
    """Bytes of parts that are whole for their turn."""

    weights: float = 0.0
    gradients: float = 0.0
    text: float = 0.0
    """Weights and gradients of the captions' tower."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.text


def visitors(model: ModelConfig, layout: Layout, stage: Stage) -> dict[str, Visitors]:
    """Phase -> what is whole on this stage at its fullest, where weights or gradients are sharded.

    The first stage has its captions' turn last in the encode phase, the last stage last in backprop; on a pipeline all
    ranks gather the captions' weights when a phase begins, and their gradients stay to the end.
    """
    phases = ("encode", "encode_text", "teacher", "loss", "text", "backprop")
    if layout.shard == "optimizer":
        return dict.fromkeys(phases, Visitors())
    element = layout.element_bytes if layout.shard == "weights" else 0
    chunks, sums = (
        [stage_parameters(model, layout, chunk) if layout.data > 1 else 0 for chunk in single_chunks(part)]
        for part in (stage, stage.above)
    )
    if layout.features:  # they have no turn
        chunks = [0] * len(chunks)
    again = [whole if own else 0 for whole, own in zip(chunks, sums, strict=True)]
    """Elements of chunks that are gathered once more, for their backward."""
    loose = 2 if layout.gathering_ranks < layout.data else 1
    """A gather within a node lands in memory of its own first."""
    text = text_parameters(model) if layout.ranks > 1 else 0
    of_text, text_sums = text * element, trained_text_parameters(model, layout.freeze) * FP32 if text else 0
    text_again = of_text if text_sums else 0
    alone = layout.pipeline == 1
    text_loose = 2 if layout.shard_ranks else 1
    waiting, waiting_again = (0, 0) if alone else (text_loose * of_text, text_loose * text_again)
    following = [*chunks[1:], 0]
    ahead = loose if layout.overlap else 0
    encode = max(now + ahead * then for now, then in zip(chunks, following, strict=True)) * element
    first, last = chunks[0], again[-1]
    turns = [
        ((now + ahead * then) * element, (own + before) * FP32)
        for now, then, own, before in zip(again, [0, *again[:-1]], sums, [*sums[1:], 0], strict=True)
    ]
    weights, gradients = max(turns, key=sum)
    return {
        "encode": Visitors(weights=encode, text=waiting if stage.has_embedding else 0),
        "encode_text": Visitors(weights=0 if stage.has_embedding else ahead * first * element, text=of_text),
        "teacher": Visitors(text=of_text if ahead or not alone else 0),
        "loss": Visitors(
            weights=ahead * last * element if stage.has_head else 0,
            text=0 if stage.has_head and alone else text_loose * text_again,
        ),
        "text": Visitors(
            weights=0 if stage.has_head else ahead * last * element,
            gradients=sums[0] * FP32 if stage.has_head else 0,
            text=text_again + text_sums,
        ),
        "backprop": Visitors(weights=weights, gradients=gradients, text=waiting_again if stage.has_head else text_sums),
    }


def stash_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """Inputs of every chunk and micro-batch at the end of encoding; the chunk that takes images keeps none.

    In host memory, of those that will be replayed: the one at work and the one on its way stay here.
    """
    inputs = stash_inputs(stage, layout.micro_batches)
    if layout.offload_stash:
        inputs = min(inputs, stash_inputs(stage, layout.keep) + OFFLOADED_INPUTS_HERE)
    return inputs * layout.message_bytes(model.vision)


def stash_inputs(stage: Stage, micro_batches: int) -> int:
    """Inputs of chunks, or what their blocks below the trained part put out, that these micro-batches stash."""
    return micro_batches * stage.above.stashed_inputs


def teaching_bytes(layout: Layout, side: int) -> float:
    """Live while a teacher works, beside its weights: pixels [side, side] of the pairs that the rank owns, and the
    forward of a micro-batch of them.
    """
    if not layout.teachers:
        return 0.0
    pixels = layout.own_rows * layout.frames * 3 * side**2
    return pixels + max(_teacher_forward_bytes(one, layout) for one in layout.teachers)


def _teacher_forward_bytes(teacher: FrozenModel, layout: Layout) -> float:
    """A whole image tower sees whole pictures, or a caption tower as many captions as a micro-batch has samples."""
    model, samples = teacher.model, min(layout.own_rows, layout.micro_batch // layout.frames)
    whole = Stage(rank=0, chunks=(model.vision.depth,), has_embedding=True, has_head=True)
    alone = replace(
        layout,
        tensor=1,
        micro_batch=samples * layout.frames,
        patch_dropout=0.0,
        precision=teacher.precision,
        kernels=kernels_of(model),
        teachers=(),
    )
    captions = text_forward_temporary_bytes(model, samples, alone.element_bytes)
    return max(locked_forward_bytes(model, alone, whole), captions)


def buffer_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """Messages between stages, megatron-core's buffer of gathered tokens, the replica's pixels on the first stage."""
    vision = model.vision
    if layout.features:
        return layout.local_batch * model.embed_dim * FP32 * stage.has_embedding
    messages: float = MESSAGES_UNDER_WAY * layout.message_bytes(vision) if layout.pipeline > 1 else 0
    if layout.pipeline == 1 and layout.virtual > 1 and layout.offload_stash:
        messages = layout.micro_batches * layout.message_bytes(vision)  # a turn's, between the chunks of the only stage
    gathered = layout.packed_tokens(vision) * vision.width * layout.element_bytes if layout.splits_tokens else 0
    pixels = layout.local_images * 3 * vision.image_size**2 if stage.has_embedding else 0
    return messages + gathered + pixels


def travelling_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> tuple[list[float], float]:
    """(of each chunk, of the captions) copies in bf16 of gradients on their way, those that leave and those that come;
    0 where they travel as they are.
    """
    each = 0 if layout.reduce_dtype == "fp32" else 2 * layout.reduced_bytes
    chunks = [stage_parameters(model, layout, chunk) for chunk in single_chunks(stage.above)]
    text = trained_text_parameters(model, layout.freeze)
    return [each * (layout.data > 1) * chunk for chunk in chunks], each * (layout.ranks > 1) * text


def _under_way(
    model: ModelConfig, layout: Layout, stage: Stage, *, live: float, left: float, late: bool
) -> dict[str, float]:
    """Phase -> what copies of gradients add to its peak.

    A bucket travels when the last backward has all of its gradients, so copies come as activations go; they stay to the
    step's end, or where more than states is shared until the next chunk's last backward. Without overlap a part travels
    at a time, when the activations are gone. live: activations at the peak of backprop. left: of what the captions'
    backward finds there at first, what is gone at the step's end. late: whether captions have a backward then.
    """
    (first, *others), text = travelling_bytes(model, layout, stage)
    if not layout.overlap:
        return {"backprop": max(0.0, max(first, *others, text) - live)}
    one, captions = single_chunks(stage.above)[0], _text_pass_bytes(model, layout)
    last_turn = max(layout.keep, 1) * own_saved_bytes(model, layout, one)
    if layout.shard == "optimizer":
        vision, to_the_end = max(0.0, sum(others) + max(first, last_turn) - live), first + sum(others)
    else:
        vision, to_the_end = max(first if others else 0.0, first - last_turn), first
    ends = late * to_the_end + max(captions.working, captions.table + text)
    early = 0.0 if late else text
    return {"backprop": early + vision, "text": max(0.0, ends - left - captions.total)}


def teacher_bytes(layout: Layout) -> float:
    """Weights of the teachers, which every rank holds whole."""
    sizes = (
        (vision_parameters(one.model) + text_parameters(one.model), BYTES[one.precision]) for one in layout.teachers
    )
    return sum(elements * size for elements, size in sizes)


def stage_memory(model: ModelConfig, layout: Layout, stage: Stage) -> Memory:
    """The peak of a rank of this stage."""
    return max(phase_memory(model, layout, stage).values(), key=lambda memory: memory.total)


def phase_memory(model: ModelConfig, layout: Layout, stage: Stage) -> dict[str, Memory]:
    """The peak of each phase that can be the step's: encode, encode_text, teacher, loss, text, backprop."""
    parameters, neighbours = stage_parameters(model, layout, stage), layout.gathering_ranks
    above = stage.above
    trained = stage_parameters(model, layout, above)
    weights, gradients, optimizer = state_bytes(layout, parameters, layout.data, neighbours, trained)
    text_neighbours = neighbours * layout.tensor if layout.shard_ranks else layout.ranks
    text_trained = trained_text_parameters(model, layout.freeze)
    text_states = sum(state_bytes(layout, text_parameters(model), layout.ranks, text_neighbours, text_trained))
    whole = visitors(model, layout, stage)
    outputs, text_outputs, moving = kept_outputs(model, layout, above)
    text_kept, text_stash = _kept_text_bytes(model, layout)
    gradients_of_rows = (layout.local_batch + layout.own_rows) * model.embed_dim * FP32
    kept = layout.keep * own_saved_bytes(model, layout, above)
    # Replays go chunk by chunk, and the kept have freed a chunk of theirs before that of another is replayed.
    live = max(kept, *(own_saved_bytes(model, layout, chunk) for chunk in set(single_chunks(above))))
    forward = vision_forward_temporary_bytes(model, layout, stage)
    locked = 0 if above.trains or layout.features else locked_forward_bytes(model, layout, stage)
    captions = layout.captions_at_once, layout.element_bytes
    encoding = max(text_kept + text_stream_bytes(model, *captions), text_forward_temporary_bytes(model, *captions))
    dealt = layout.local_batch * model.embed_dim * FP32 if stage.has_head else 0
    behind = stage.has_embedding or (layout.deals_captions and not stage.has_head)
    """Whether captions are encoded behind the units, too, which have left their inputs and what they keep."""
    teaching = teaching_bytes(layout, model.vision.image_size)
    phases = {
        "encode": (kept + forward if kept else locked, 0 if stage.has_embedding else text_kept, dealt),
        "encode_text": (kept if behind else 0, encoding, dealt),
        "loss": (kept, text_kept, loss_bytes(model, layout)),
        **({"teacher": (kept if stage.has_embedding else 0, 0, dealt)} if teaching else {}),
        "text": (0 if stage.has_head else kept, text_kept + _text_pass_bytes(model, layout).total, gradients_of_rows),
        "backprop": (
            live + max(forward, vision_temporary_bytes(model, layout, above)) if above.trains else 0,
            text_kept,
            gradients_of_rows,
        ),
    }
    stash, buffers = stash_bytes(model, layout, stage), buffer_bytes(model, layout, stage)
    under_way = _under_way(
        model,
        layout,
        stage,
        live=phases["backprop"][0],
        left=0 if stage.has_head else kept + stash,
        late=stage.has_head or layout.deals_captions,
    )
    without = {*(("text",) if stage.has_head else ()), *(() if behind else ("encode_text",))}
    without |= set() if stage.has_embedding else {"teacher"}  # the others are taught before their first unit
    return {
        phase: Memory(
            weights=weights + whole[phase].weights,
            gradients=gradients + whole[phase].gradients,
            optimizer=optimizer,
            stash=0 if phase in without else stash,
            outputs=0 if phase in without else outputs,
            activations=activations,
            text=text_states + text + whole[phase].text + text_outputs + text_stash,
            loss=loss,
            buffers=buffers + (moving if phase in ("encode", "backprop") else 0) + under_way.get(phase, 0),
            teachers=teacher_bytes(layout) + (teaching if phase == "teacher" else 0),
        )
        for phase, (activations, text, loss) in phases.items()
    }


def _kept_text_bytes(model: ModelConfig, layout: Layout) -> tuple[float, float]:
    """(activations of all captions, where they keep them; what waits for their replay behind blocks below it)."""
    trained, keeps = text_above(model, layout), layout.keep >= layout.micro_batches
    if trained is None:
        return 0, 0
    if keeps:
        return text_saved_bytes(trained, layout.own_rows, layout.element_bytes, layout.kernels.of_captions), 0
    divided = trained.text.depth < model.text.depth
    return 0, divided * layout.own_rows * model.text.context_length * model.text.width * layout.element_bytes


def kept_outputs(model: ModelConfig, layout: Layout, stage: Stage) -> tuple[float, float, float]:
    """(vision, captions, on their way) of a rank's kept outputs on the device."""
    if not layout.keeps_outputs:
        return 0, 0, 0
    vision, text = outputs_bytes(model, layout, stage)
    if not layout.offload_outputs:
        return vision, text, 0
    *levels, _ = output_levels(model, layout, stage)
    passes = [pass_output_bytes(model, layout, stage, chunk, level) for chunk, level in enumerate(levels)]
    return 0, 0, OFFLOADED_INPUTS_HERE * max(passes)


@lru_cache(maxsize=4096)
def single_chunks(stage: Stage) -> list[Stage]:
    """Each chunk of a stage as a stage of its own: a micro-batch is replayed chunk by chunk."""
    last = len(stage.chunks) - 1
    return [
        replace(
            stage,
            chunks=(blocks,),
            has_embedding=stage.has_embedding and number == 0,
            has_head=stage.has_head and number == last,
            repeated=None if stage.repeated is None else single_chunks(stage.repeated)[number],
            inputs=-1,
        )
        for number, blocks in enumerate(stage.chunks)
    ]


def own_saved_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """What a kept micro-batch adds: all that autograd keeps but the chunks' inputs, which are counted as stash."""
    return micro_batch_saved_bytes(model, layout, stage) - stage.stashed_inputs * layout.message_bytes(model.vision)


@dataclass(frozen=True, kw_only=True)
class _TextPass:
    """Replay and backward of the captions of one pass."""

    working: float = 0.0
    table: float = 0.0
    """The token table's gradient, which is dense; it comes last."""

    @property
    def total(self) -> float:
        """The higher of both moments."""
        return max(self.working, self.table)


def _text_pass_bytes(model: ModelConfig, layout: Layout) -> _TextPass:
    text, element, kernels = model.text, layout.element_bytes, layout.kernels.of_captions
    trained, captions = text_above(model, layout), layout.captions_at_once
    if trained is None:
        return _TextPass()
    temporary = backward_temporary_bytes(
        text_blocks(text),
        captions * text.context_length,
        element=element,
        tensor=1,
        splits_tokens=False,
        kernels=kernels,
    )
    is_learned = not layout.freeze or "text.token_embedding" not in frozen_in(model, layout.freeze).names
    table = is_learned * text.vocab_size * text.width * element
    saved = 0 if layout.keep >= layout.micro_batches else text_saved_bytes(trained, captions, element, kernels)
    return _TextPass(working=saved + temporary, table=table)


@lru_cache(maxsize=256)
def peak_memory(model: ModelConfig, layout: Layout) -> Memory:
    """Memory of the fullest rank of the job."""
    stages = telling_stages(stages_of(model, layout))
    return max((stage_memory(model, layout, stage) for stage in stages), key=lambda memory: memory.total)


def checkpoint_bytes(model: ModelConfig, precision: str) -> tuple[int, int]:
    """Weights, and fp32 master (bf16 only), m and v, of the whole model on disk."""
    elements = vision_parameters(model) + text_parameters(model)
    return (elements * 2, elements * 12) if precision == "bf16" else (elements * 4, elements * 8)
