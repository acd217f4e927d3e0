"""Seconds of a contrastive step by part, on the ranks of the slowest stage. Projected from a hardware profile.

The program is engine/objectives/contrastive/program.py's. With m micro-batches, k of them kept, v chunks a rank and P
stages, f and b the forward and backward of one micro-batch on a stage (collectives over the tensor axis included):
- the stage works m f + (m - k) r + m b (+ m r with full recomputation inside it); r, a replay, is f without the
  products whose outputs were kept, and without the collectives that these spare;
- where there is a pipeline a receive that was posted ahead waits on multiprocessors, which are missing elsewhere;
- the bubble is (P - 1) / v x (f + b): the replay of the first micro-batch runs while its gradient travels;
- with v > 1 micro-batches go round in groups. Where a rank's chunks are uneven, its stages are apart by the time of the
  largest and have the work of the smallest to cover it; and the first message of a group of P is waited for once a
  round, that of a larger one has come already;
- captions hide in parts before a stage's first message and behind its last one: (P - 1) f / v for their encoding,
  (P - 1) b / v for their backward. Where weights or gradients are sharded they are not dealt, and the second stage has
  f / v, the last but one b / v. The rest delays everyone;
- collectives over the tensor axis are not overlapped; messages between stages are, while they take less than a unit;
- gradients are reduced during the last backward and weights gathered during the first forward: what exceeds these
  windows is left over. A chunk that works all its micro-batches in a row is reduced behind its turn and, where weights
  are sharded, gathered for two turns during the turn before: what a turn does not hide, and the first gather, is left;
- copies to the host and back have the encode phase and backprop to hide behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from engine.config.sections.optim import MOMENTS
from engine.config.sections.parallel import LINK_BLOCKS
from engine.pipeline.program import Alone
from models.config import ModelConfig
from models.tensors.kept import LEVELS
from tools.cost.activations import FP32, output_levels, outputs_bytes
from tools.cost.cluster import Cluster, decoding_nodes
from tools.cost.compute import PassSeconds, stage_seconds, teachers_seconds, text_seconds
from tools.cost.counts import text_parameters
from tools.cost.hardware import Hardware
from tools.cost.layout import (
    Layout,
    Stage,
    stages_of,
    telling_stages,
    text_above,
    trained_text_parameters,
    trains_images,
)
from tools.cost.loss import IDENTIFIER, LossWork, loss_work, relational_work
from tools.cost.memory import optimizer_bytes_per_element, stage_parameters, stash_inputs
from tools.cost.traffic import (
    RING_ROUNDS,
    block_backward_collectives,
    block_forward_collectives,
    gathered_elements,
    stage_collectives,
    token_gradient_elements,
)

BUCKET_ELEMENTS = 40_000_000
OPTIMIZER_PASSES = {"lamb": 5, "adamw": 2}
"""Reads and writes of the optimizer's state, in units of it: LAMB has separate kernels, AdamW torch's fused one."""
AVERAGE_PASSES = 3
"""Average and master read, average written."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    compute: float
    """Vision: encode, replay, backward."""
    tensor: float
    """Collectives of tensor parallelism."""
    p2p: float
    """Messages between stages, copies of an offloaded stash, and the dealing of pixels or features to those who own
    their rows, that no work hides."""
    bubble: float
    """Waiting while the pipeline fills and drains."""
    text: float
    """Captions that do not fit into a wait."""
    teachers: float
    """Forwards of frozen CLIPs, which take the captions' turn."""
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
    spared: float = 0.0
    """Seconds of a forward that a replay does not take, tensor axis included."""
    spared_tensor: float = 0.0
    """The tensor axis's part of it."""

    @property
    def r(self) -> float:
        """A replay with its collectives."""
        return self.f - self.spared

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
    whole = _passes(model, layout, stage, cluster)
    return whole if stage.repeated is None else _with_backward_of(whole, _passes(model, layout, stage.above, cluster))


def _with_backward_of(whole: UnitTime, above: UnitTime) -> UnitTime:
    """A stage that repeats, and works backward, the part `above` alone."""
    spared_tensor = whole.tensor_forward - above.tensor_forward + above.spared_tensor
    return replace(
        whole,
        backward=above.backward,
        tensor_backward=above.tensor_backward,
        spared=whole.f - above.f + above.spared,
        spared_tensor=spared_tensor,
    )


def _passes(model: ModelConfig, layout: Layout, stage: Stage, cluster: Cluster) -> UnitTime:
    if layout.features:
        return UnitTime(forward=0.0, backward=0.0, tensor_forward=0.0, tensor_backward=0.0)
    computed = stage_seconds(model, layout, stage, cluster.hardware)
    waiting = LINK_BLOCKS / cluster.hardware.multiprocessors if layout.pipeline > 1 else 0.0
    computed = PassSeconds().plus(computed, 1 / (1 - waiting))
    tensor_forward, tensor_backward = (
        _tensor_seconds(layout, stage_collectives(of_block, model.vision, layout, stage), cluster)
        for of_block in (block_forward_collectives, block_backward_collectives)
    )
    spared_tensor = _spared_collectives(model, layout, stage) * tensor_forward
    again = 1 if layout.recompute == "full" else 0
    return UnitTime(
        forward=computed.forward,
        backward=computed.backward + again * (computed.forward - computed.spared),
        tensor_forward=tensor_forward,
        tensor_backward=tensor_backward + again * (tensor_forward - spared_tensor),
        spared=computed.spared + spared_tensor,
        spared_tensor=spared_tensor,
    )


_COLLECTIVES_BEFORE = {"fc2": 0.25, "proj": 0.25, "qkv": 0.25, "fc1": 0.25}
"""Kind of product -> share of a block's forward over the tensor axis that goes with it, under sequence parallelism."""


def _spared_collectives(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """Share of the forward's collectives that a replay does not need."""
    if layout.tensor == 1 or not layout.keeps_outputs:
        return 0.0
    *levels, _ = output_levels(model, layout, stage)
    shares = [_spared_share(layout, level) * blocks for level, blocks in zip(levels, stage.chunks, strict=True)]
    return sum(shares) / max(1, stage.blocks)


def _spared_share(layout: Layout, level: str) -> float:
    if layout.splits_tokens:
        return sum(_COLLECTIVES_BEFORE[kind] for kind in LEVELS[level])
    return sum(0.5 for kind in LEVELS[level] if kind in ("fc2", "proj"))


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
    m, replays = layout.micro_batches, layout.micro_batches - layout.keep
    slow = slowest(layout, units)
    unit, stage, hardware = units[slow], stages[slow], cluster.hardware
    spared_tensor = unit.spared_tensor
    fill = (layout.pipeline - 1) / layout.virtual
    bubble = fill * (unit.f + unit.b) + _uneven_rounds(layout, stage, unit)
    text_forward, text_backward = text_step(model, layout, hardware)
    taught = teachers_seconds(layout, hardware)
    before = dict(
        compute=m * (unit.forward + unit.backward) + replays * (unit.r - unit.tensor_forward + spared_tensor),
        tensor=m * (unit.tensor_forward + unit.tensor_backward) + replays * (unit.tensor_forward - spared_tensor),
        p2p=_message_time(model, layout, stage, unit, cluster),
        bubble=bubble,
        text=_left_over(text_forward, unit.f, layout) + _left_over(text_backward, unit.b, layout),
        teachers=_left_over(text_forward, unit.f, layout, taught) - _left_over(text_forward, unit.f, layout),
        data=state_time(model, layout, stage, unit, text_backward, cluster).total,
        loss=loss_seconds(model, layout, cluster),
        optimizer=contrastive_optimizer_seconds(model, layout, stage, hardware),
    )
    nodes = decoding_nodes(layout, cluster)
    return StepTime(**before, input=input_seconds(model, layout, sum(before.values()), cluster, nodes))


def slowest(layout: Layout, units: Sequence[UnitTime]) -> int:
    """Number of the stage that takes longest."""
    m, replays = layout.micro_batches, layout.micro_batches - layout.keep
    return max(range(len(units)), key=lambda i: m * (units[i].f + units[i].b) + replays * units[i].r)


def _uneven_rounds(layout: Layout, stage: Stage, unit: UnitTime) -> float:
    """Waiting of the groups' rounds for each other, none with equal chunks. Backprop has the replay to cover it."""
    largest, smallest = (size(stage.chunks) / stage.blocks for size in (max, min))
    encode = (largest - smallest) * unit.f
    backprop = largest * unit.b - smallest * (unit.r + unit.b)
    groups = layout.micro_batches / layout.round_size
    return groups * (layout.pipeline - 1) * (encode + max(0.0, backprop))


def text_step(model: ModelConfig, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """(encoding, backward with its replay) of a rank's captions; kept whole where every micro-batch is."""
    once = _captions(model, layout, hardware)
    trained = text_above(model, layout)
    if trained is None:
        return once.forward, 0.0
    again = _captions(trained, layout, hardware)
    replay = 0 if layout.keep >= layout.micro_batches else again.forward - again.spared
    return once.forward, replay + again.backward


def _captions(model: ModelConfig, layout: Layout, hardware: Hardware) -> PassSeconds:
    """All of a rank, once."""
    return text_seconds(
        model,
        layout.own_rows,
        layout.captions_at_once,
        hardware,
        layout.element_bytes,
        layout.keep_outputs,
        kernels=layout.kernels.of_captions,
    )


def _left_over(text: float, window: float, layout: Layout, ahead: float = 0.0) -> float:
    """Seconds by which captions, and what goes ahead of them, delay a phase of units that take `window` a stage."""
    if layout.pipeline == 1:
        return ahead + text
    wait = window / layout.virtual
    if not layout.deals_captions:
        return max(0.0, ahead + text - wait)
    late = left = 0.0  # of a stage's first unit, for which those before it wait, too; of the phase's end
    for waits, first in enumerate(_first_turns(layout)):
        late = max(late, text * first + ahead * (waits > 0) - waits * wait)
        rest = text * (1 - first) + ahead * (waits == 0)
        left = max(left, late + rest - (layout.pipeline - 1 - waits) * wait)
    return max(late, left)


def _first_turns(layout: Layout) -> list[float]:
    """Share of the captions ahead of a stage's units, by the number of units that it waits for."""
    parts, last = layout.caption_parts, layout.pipeline - 1
    turns = [Alone("", (0.0, waits / last)).parts(parts) for waits in range(layout.pipeline)]
    return [turn.stop / parts for turn in turns]


def _text_slack(text_backward: float, unit: UnitTime, layout: Layout) -> float:
    """Seconds from the last captions' backward to the step's last one; below 0 where there are none."""
    wait, last = unit.b / layout.virtual, layout.pipeline - 1
    if not layout.deals_captions:  # the last stage's come last, which is done before the first
        return last * wait - text_backward
    turns = enumerate(_first_turns(layout))
    return min((last - waits) * wait - (1 - first) * text_backward for waits, first in turns if first < 1)


def _message_time(model: ModelConfig, layout: Layout, stage: Stage, unit: UnitTime, cluster: Cluster) -> float:
    copies = sum(host_excess(model, layout, stage, unit, cluster.hardware)) + deal_seconds(model, layout, cluster)
    if layout.pipeline == 1 or layout.features:
        return copies
    each = cluster.message_seconds(layout, layout.message_bytes(model.vision))
    units, chunk = layout.micro_batches * layout.virtual, 1 / layout.virtual
    left = max(0.0, each - unit.f * chunk) + max(0.0, each - (unit.r + unit.b) * chunk)
    rounds = 0
    if layout.round_size <= layout.pipeline:  # of a longer round the first message has come; replays hide backprop's
        rounds = (layout.micro_batches + layout.keep) * (layout.virtual - 1)
    return copies + units * left + (rounds + 2 * (layout.pipeline - 1)) * each


def deal_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """Pixels for the teachers, or features, from the first stage to the ranks that own their rows, before all else."""
    if layout.pipeline == 1 or not (layout.teachers or layout.features):
        return 0.0
    row = model.embed_dim * FP32 if layout.features else layout.frames * 3 * model.vision.image_size**2
    return (layout.pipeline - 1) * cluster.message_seconds(layout, layout.own_rows * row)


def host_excess(
    model: ModelConfig, layout: Layout, stage: Stage, unit: UnitTime, hardware: Hardware
) -> tuple[float, float]:
    """Seconds by which copies to the host exceed the encode phase, and copies back backprop."""
    each, m = host_bytes(model, layout, stage) / (hardware.pcie_all_gb_s * 1e9), layout.micro_batches
    return max(0.0, each - m * unit.f), max(0.0, each - m * unit.b - (m - layout.keep) * unit.r)


def host_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """Bytes of a rank in host memory: stage inputs of micro-batches that are replayed, and kept outputs."""
    stash = 0.0
    if layout.offload_stash:
        stash = stash_inputs(stage, layout.micro_batches - layout.keep) * layout.message_bytes(model.vision)
    return stash + (sum(outputs_bytes(model, layout, stage.above)) if layout.offload_outputs else 0)


@dataclass(frozen=True, kw_only=True)
class StateTime:
    """Seconds of gathering weights and reducing gradients that no work hides."""

    turns: float
    """Waits for sharded parts within encode and backprop, which tools.simulate plays one by one."""
    ends: float
    """Waits at the step's ends."""

    @property
    def total(self) -> float:
        """Both."""
        return self.turns + self.ends


def state_time(
    model: ModelConfig, layout: Layout, stage: Stage, unit: UnitTime, text_backward: float, cluster: Cluster
) -> StateTime:
    """Both towers' on a stage."""
    vision = _vision_state(model, layout, stage, unit, cluster)
    reduce, gather = text_state_seconds(model, layout, cluster)
    if layout.shard == "weights" and text_above(model, layout) is not None:
        gather *= 2
    if layout.overlap and layout.pipeline == 1:  # captions come last
        gather = max(0.0, gather - layout.micro_batches * unit.f / layout.virtual)
    if layout.overlap:
        reduce = max(0.0, reduce - max(0.0, _text_slack(text_backward, unit, layout)))
    if layout.shard == "weights":
        return StateTime(turns=vision.turns + gather, ends=vision.ends + reduce)
    return StateTime(turns=vision.turns, ends=vision.ends + reduce + gather)


def text_state_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """(reduction, one gathering) of the caption tower over all ranks."""
    trained = trained_text_parameters(model, layout.freeze)
    held = text_parameters(model) if layout.shard == "weights" else trained
    buckets = -(-held // (layout.bucket_size or BUCKET_ELEMENTS))
    reduce = cluster.collective_seconds(layout, "world", trained * layout.reduced_bytes, buckets)
    return reduce, cluster.collective_seconds(layout, "world", held * layout.element_bytes, buckets)


def vision_state_seconds(model: ModelConfig, layout: Layout, stage: Stage, unit: UnitTime, cluster: Cluster) -> float:
    """Reduction of the image tower's gradients and gathering of its weights that no work hides."""
    return _vision_state(model, layout, stage, unit, cluster).total


def _vision_state(model: ModelConfig, layout: Layout, stage: Stage, unit: UnitTime, cluster: Cluster) -> StateTime:
    reduce, gather = vision_transfer_seconds(model, layout, stage, cluster)
    turns, m = layout.virtual if layout.round_size == layout.micro_batches else 1, layout.micro_batches
    owners = layout.data if layout.shard != "optimizer" else 1
    partial = token_gradient_elements(model, stage.above) * FP32 / owners if layout.splits_tokens else 0
    ends = 2 * cluster.collective_seconds(layout, "tensor", partial)
    if layout.shard == "weights":
        again = gathered_elements(model, layout, stage)[0] - stage_parameters(model, layout, stage)
        share = max(0.0, again / stage_parameters(model, layout, stage))  # of what has a backward
        return StateTime(turns=_turns(layout, unit, reduce, gather, share * gather), ends=ends)
    if layout.overlap:
        reduce = max(0.0, (reduce - unit.b) / turns, reduce - m * (unit.f + unit.b))
        gather = max(0.0, (gather - unit.f) / turns, gather - m * unit.f)
    if layout.shard == "gradients":
        return StateTime(turns=reduce, ends=ends + gather)
    return StateTime(turns=0.0, ends=ends + reduce + gather)


def vision_transfer_seconds(model: ModelConfig, layout: Layout, stage: Stage, cluster: Cluster) -> tuple[float, float]:
    """(reduction, one gathering) of what a stage holds of the image tower, hidden or not."""
    trained = stage_parameters(model, layout, stage.above)
    held = stage_parameters(model, layout, stage) if layout.shard == "weights" else trained
    if layout.features:
        held = trained
    buckets = max(len(stage.chunks), -(-held // (layout.bucket_size or BUCKET_ELEMENTS)))
    reduce = cluster.collective_seconds(layout, "data", trained * layout.reduced_bytes, buckets)
    return reduce, _gather_seconds(layout, held * layout.element_bytes, buckets, cluster)


def _gather_seconds(layout: Layout, whole_bytes: float, count: int, cluster: Cluster) -> float:
    """All-gather of a stage's weights: over the data axis, or over the neighbours that hold them once among them."""
    if layout.gathering_ranks in (1, layout.data):
        return cluster.collective_seconds(layout, "data", whole_bytes, count)
    neighbours = replace(layout, data=layout.gathering_ranks, global_batch=layout.gathering_ranks)
    return cluster.collective_seconds(neighbours, "data", whole_bytes, count)


def _turns(layout: Layout, unit: UnitTime, reduce: float, gather: float, again: float) -> float:
    """Seconds of sharded weights that turns of chunks do not hide; each is gathered, `again` for its backward, and
    reduced once.
    """
    if not layout.overlap:
        return reduce + gather + again
    v, m = layout.virtual, layout.micro_batches
    forward, backward = m * unit.f / v, (m * unit.b + (m - layout.keep) * unit.r) / v
    first, last = (gather + again) / v, reduce / v
    encode = max(0.0, gather / v - forward)
    backprop = max(0.0, (again + reduce) / v - backward)
    return first + last + (v - 1) * (encode + backprop)


def loss_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """Products and passes over tiles (loss.py), gathered embeddings and sums, and the rows' way from the last stage
    and back. The interactive loss of a teacher is two more of it, the relational one has the matrices of student
    and teacher.
    """
    local = layout.local_batch * model.embed_dim * FP32
    dealt = cluster.message_seconds(layout, local) if layout.pipeline > 1 and not layout.features else 0.0
    crossed = 2 * sum(one.interactive for one in layout.teachers)
    widths = (*layout.loss_widths(model), *[model.embed_dim] * crossed)
    losses = sum(_one_loss_seconds(width, layout.loss, loss_work(width, layout), layout, cluster) for width in widths)
    for one in layout.teachers:
        if one.relational:  # rows side by side; only the student's have gradients
            width, work = model.embed_dim + one.model.embed_dim, relational_work(one, model, layout)
            losses += _one_loss_seconds(width, "softmax", work, layout, cluster)
            losses += cluster.collective_seconds(layout, "world", 4 * layout.global_batch * FP32, 2)
    back = cluster.collective_seconds(layout, "replica", local) if trains_images(model, layout) else 0.0
    return losses + dealt + back


def _one_loss_seconds(width: int, loss: str, work: LossWork, layout: Layout, cluster: Cluster) -> float:
    """Rows of one width. A softmax gathers normalisers and sums over columns, a sigmoid has their maximum. A ring's
    blocks travel beside the products.
    """
    batch, worked = layout.global_batch, work.seconds(layout, cluster.hardware)
    normalised = loss == "softmax"
    tower, normalisers = batch * width * FP32, normalised * 2 * batch * FP32
    summed = (2 if normalised else 1) * batch * FP32
    normalisers += layout.copies * batch * IDENTIFIER
    sums = 2 * cluster.collective_seconds(layout, "world", summed, 2 + normalised)
    if layout.loss_variant == "gather":
        return worked + cluster.collective_seconds(layout, "world", 2 * tower + normalisers, 2 + normalised) + sums
    rounds = RING_ROUNDS[loss]
    travelling = cluster.collective_seconds(layout, "world", rounds * tower, rounds)
    return max(worked, travelling) + cluster.collective_seconds(layout, "world", normalisers, normalised) + sums


def contrastive_optimizer_seconds(model: ModelConfig, layout: Layout, stage: Stage, hardware: Hardware) -> float:
    """Update of both towers on a stage, and looks at what lies in memory between two updates."""
    vision, held = (stage_parameters(model, layout, part) for part in (stage.above, stage))
    text, text_held = trained_text_parameters(model, layout.freeze), text_parameters(model)
    owned = vision / layout.data + text / layout.ranks
    frozen = (held - vision) / layout.data + (text_held - text) / layout.ranks
    shares = layout.shard == "weights"
    compared = held * (not shares or layout.data == 1) + text_held * (not shares or layout.ranks == 1)
    looked_at = watched_bytes(owned, compared, frozen, layout) / hardware.memory_bytes_s
    return optimizer_seconds(owned, vision + text, layout, hardware) + looked_at


def optimizer_seconds(owned: float, gradients: float, layout: Layout, hardware: Hardware) -> float:
    """Update of the `owned` elements, and zeroing of a rank's fp32 `gradients`."""
    state = optimizer_bytes_per_element(replace(layout, averages=False)) + FP32
    moved = state * OPTIMIZER_PASSES[layout.optimizer] + layout.averages * AVERAGE_PASSES * FP32
    return (owned * moved + gradients * FP32) / hardware.memory_bytes_s


def watched_bytes(owned: float, compared: float, frozen: float, layout: Layout) -> float:
    """Read in a step, taking one with another, for sums of bits (engine/resilience/audit.py): of the state of the
    `owned` elements behind an update and before the next; each layout.audit_every_steps of `compared` weights, which
    have copies elsewhere, of masters' roundings beside the weights, and twice of `frozen` ones.
    """
    every, element = layout.audit_every_steps, layout.element_bytes
    if not every:
        return 0.0
    kinds = 1 + len(MOMENTS[layout.optimizer]) + layout.averages
    rounded = owned * (FP32 + 3 * element) if element < FP32 else 0.0  # a copy is written and read, and the weight
    now_and_then = compared * element + rounded + min(2, every) * frozen * element
    return 2 * owned * kinds * FP32 + now_and_then / every


def input_seconds(model: ModelConfig, layout: Layout, rest_s: float, cluster: Cluster, nodes: int) -> float:
    """Pixels of the replica to its GPUs; or, if longer, waiting for the CPUs of the `nodes` that decode."""
    if layout.features:
        return layout.local_batch * model.embed_dim * FP32 / (cluster.hardware.pcie_gb_s * 1e9)
    pixels = layout.local_images * 3 * model.vision.image_size**2
    copied = pixels / layout.tensor / (cluster.hardware.pcie_gb_s * 1e9)
    copied += cluster.collective_seconds(layout, "tensor", pixels)
    decoded = layout.global_batch * layout.frames / (nodes * cluster.hardware.decode_images_s)
    return max(copied, decoded - rest_s)
