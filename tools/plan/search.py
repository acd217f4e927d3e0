"""All layouts of a job, each with the micro-batches it can keep; the fastest of every TP × PP that fits.

Searched: TP (within a node) × PP × virtual stages × micro-batch × sequence parallelism on or off × recomputation (only
where nothing fits without) × k, the most that fits × captions a pass. `selective` recomputation is left out: with an
attention that keeps no S × S it saves the log-sum-exp alone, 0.05 % of a block of the 18B.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.config.stages import balanced_layers, even_layers
from models.config import ModelConfig
from tools.cost.activations import micro_batch_saved_bytes, text_saved_bytes, vision_temporary_bytes
from tools.cost.cluster import Cluster
from tools.cost.estimate import Estimate, priced
from tools.cost.layout import Layout, PlanError, stages_of, telling_stages
from tools.cost.memory import Memory, peak_memory

MOST_CHUNKS = 8
MOST_IMAGES = 1024
"""Sizes of a micro-batch that are tried."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be laid out."""

    model: ModelConfig
    cluster: Cluster
    global_batch: int
    patch_dropout: float
    frames: int = 1
    """Images of a pair: 1, or those of a clip."""
    offload_stash: bool = False
    """Consider layouts that keep the stash in host memory only, where there is a pipeline."""

    @property
    def whole_batch(self) -> int:
        """The nearest batch that is a multiple of the GPUs, which every DP divides."""
        return max(1, round(self.global_batch / self.cluster.gpus)) * self.cluster.gpus

    def check(self) -> None:
        """Raise PlanError for numbers that no layout can have."""
        gpus, node, batch = self.cluster.gpus, self.cluster.per_node, self.global_batch
        if gpus < 1 or node < 1 or batch < 1:
            raise PlanError(f"--gpus {gpus}, --nodes-of {node} and --global-batch {batch} must be at least 1")
        if gpus > node and gpus % node:
            near = gpus // node * node
            raise PlanError(f"--gpus {gpus} is not a multiple of --nodes-of {node}: take {near} or {near + node}")
        if self.frames < 1:
            raise PlanError(f"--frames {self.frames} must be at least 1")
        if not 0 <= self.patch_dropout < 1:
            raise PlanError(f"--patch-dropout {self.patch_dropout} must be in [0, 1)")
        if batch < gpus:
            raise PlanError(
                f"--global-batch {batch} is smaller than the {gpus} GPUs, each of which encodes captions of its own: "
                f"take at most {batch} GPUs"
            )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search comes to."""

    best: list[Estimate]
    """The fastest of each TP × PP that fits, fastest first."""
    tried: int
    """Layouts whose memory was computed."""
    nearest: Estimate | None
    """Where none fits: the one that needs the least memory."""


def search(job: Job) -> Found:
    """Raises PlanError where no layout divides GPUs, model and batch."""
    job.check()
    best: dict[tuple[int, int], Estimate] = {}
    smallest: tuple[Memory, Layout] | None = None
    tried = 0
    for candidate in candidates(job):
        tried += 1
        layout, memory = with_kept(job, candidate)
        if memory.total > job.cluster.hardware.usable_bytes:
            if smallest is None or memory.total < smallest[0].total:
                smallest = memory, layout
            continue
        found = priced(job.model, layout, job.cluster, memory)
        place = layout.tensor, layout.pipeline
        if place not in best or speed(found) < speed(best[place]):
            best[place] = found
    if not tried:
        raise PlanError(_nothing_divides(job))
    nearest = None
    if not best and smallest is not None:
        nearest = priced(job.model, smallest[1], job.cluster, smallest[0])
    refined = [with_fewer_captions(job, entry) for entry in best.values()]
    return Found(best=sorted(refined, key=speed), tried=tried, nearest=nearest)


def speed(entry: Estimate) -> tuple[float, float]:
    """Step time; between layouts that wait for the decoding CPUs alike, what the GPUs take."""
    return round(entry.time.total, 6), entry.time.total - entry.time.input


def candidates(job: Job) -> Iterator[Layout]:
    """Every layout that engine/config/read.py accepts, with no micro-batch kept; with full recomputation only
    as needed.
    """
    for layout in _cuts(job):
        for samples in _divisors(layout.local_batch):
            if samples * job.frames > MOST_IMAGES:
                break
            one = replace(layout, micro_batch=samples * job.frames)
            if one.virtual > 1 and one.micro_batches % one.pipeline:
                continue
            for sequence in (True, False) if one.tensor > 1 else (True,):
                tokens = one.packed_tokens(job.model.vision)
                if sequence and tokens % one.tensor:
                    continue
                yield _with_recompute(job, _with_captions(job, replace(one, sequence=sequence)))


def _cuts(job: Job) -> Iterator[Layout]:
    vision, gpus = job.model.vision, job.cluster.gpus
    tokens = vision.kept_tokens(job.patch_dropout)
    for tensor in _divisors(min(job.cluster.per_node, gpus)):
        if gpus % tensor or vision.heads % tensor or vision.mlp_hidden % tensor:
            continue
        for pipeline in _divisors(gpus // tensor):
            data = gpus // (tensor * pipeline)
            if pipeline > vision.depth or job.global_batch % data:
                continue
            for virtual in range(1, 1 + (min(MOST_CHUNKS, vision.depth // pipeline) if pipeline > 1 else 1)):
                counts = balanced_layers(job.model, stages=pipeline, virtual=virtual, tokens=tokens)
                even = counts == even_layers(vision.depth, pipeline * virtual)
                yield Layout(
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual=virtual,
                    data=data,
                    global_batch=job.global_batch,
                    micro_batch=job.frames,
                    frames=job.frames,
                    patch_dropout=job.patch_dropout,
                    offload_stash=job.offload_stash and pipeline > 1,
                    layers=None if even else tuple(counts),
                )


def _with_captions(job: Job, layout: Layout) -> Layout:
    """As many captions a pass as need no more memory than a micro-batch of images."""
    stages = telling_stages(stages_of(job.model, layout))
    live = max(
        micro_batch_saved_bytes(job.model, layout, stage) + vision_temporary_bytes(job.model, layout, stage)
        for stage in stages
    )
    each = text_saved_bytes(job.model, 1, layout.element_bytes)
    fitting = max(1, int(live / each))
    passes = -(-layout.own_rows // fitting)
    return replace(layout, text_micro_batch=-(-layout.own_rows // passes))


def _with_recompute(job: Job, layout: Layout) -> Layout:
    fits = peak_memory(job.model, layout).total <= job.cluster.hardware.usable_bytes
    return layout if fits else replace(layout, recompute="full")


def with_kept(job: Job, layout: Layout) -> tuple[Layout, Memory]:
    """The layout with the largest k that fits, and its memory; k = 0 where that does not fit either."""
    base = peak_memory(job.model, layout)
    room = job.cluster.hardware.usable_bytes - base.total
    if room < 0 or layout.recompute == "full":
        return layout, base
    one, two = (peak_memory(job.model, replace(layout, keep=keep)).total for keep in (1, 2))
    most = min(layout.micro_batches, 1 + int(room / max(1.0, two - one)))
    for keep in range(most, max(0, most - 3), -1):
        kept = replace(layout, keep=keep)
        memory = peak_memory(job.model, kept)
        if memory.total <= job.cluster.hardware.usable_bytes:
            return kept, memory
    return layout, base


def with_fewer_captions(job: Job, entry: Estimate) -> Estimate:
    """The same with passes of fewer captions, if the micro-batches that then fit save more than the passes cost."""
    layout, tried = entry.layout, [entry]
    assert layout is not None
    captions = layout.captions_at_once
    while captions > 8:
        captions = -(-captions // 2)
        fewer, memory = with_kept(job, replace(layout, text_micro_batch=captions, keep=0))
        tried.append(priced(job.model, fewer, job.cluster, memory))
    return min(tried, key=speed)


def _nothing_divides(job: Job) -> str:
    gpus, batch, vision = job.cluster.gpus, job.global_batch, job.model.vision
    return (
        f"no TP × PP × DP of {gpus} GPUs divides --global-batch {batch} and the model ({vision.depth} blocks, "
        f"{vision.heads} heads, MLP {vision.mlp_hidden}, TP within nodes of {job.cluster.per_node}): "
        f"take a multiple of the GPUs, such as {job.whole_batch}"
    )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
