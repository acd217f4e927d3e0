"""All layouts of a job, each with the micro-batches it can keep; the fastest of every TP × PP that fits.

Searched: TP (within a node) × PP × chunks × what the data-parallel ranks share (states, gradients, weights; among all
or within a node) × micro-batch × sequence parallelism on or off × recomputation (only where nothing fits without); of
each the best of: k, the most micro-batches that fit with their activations; outputs of products as far as memory goes;
as many of them in host memory as the copies hide, the stash there or here, with k of what is left. `selective`
recomputation is left out: with an attention that keeps no S × S it saves the log-sum-exp alone, 0.05 % of a block of
the 18B; with model.attention=matmul, which keeps it, a job has to ask for it itself. All else is as the job's settings
say (tools/plan/given.py).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter

from engine.config.stages import balanced_layers, even_layers
from models.config import FP8_MULTIPLES, ModelConfig
from models.kernel_checks import odd_in_fp8
from tools.cli import counted
from tools.cost.activations import micro_batch_saved_bytes, text_saved_bytes, vision_temporary_bytes
from tools.cost.cluster import Cluster
from tools.cost.kernels import Kernels
from tools.cost.layout import FrozenModel, Layout, PlanError, stages_of, telling_stages, trains_images
from tools.cost.memory import Memory, peak_memory
from tools.cost.time import host_bytes, step_time, unit_time
from tools.plan.estimate import Estimate, priced

MOST_CHUNKS = 8
MOST_IMAGES = 1024
"""Sizes of a micro-batch that are tried."""
FEWEST_TOKENS = 500
"""Packed tokens below which no product is worth a pass, where the batch allows for more."""
MOST_PRICED = 48
"""Ways to run that fit and are priced for each TP × PP, those with the least work first."""
REFINED = 4
"""How many of these, the fastest, are tried with fewer captions a pass."""
HIDDEN = 0.95
"""Share of a phase that copies to the host may take."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be laid out."""

    model: ModelConfig
    cluster: Cluster
    global_batch: int
    patch_dropout: float
    frames: int = 1
    """Images of a pair: 1, or those of a clip."""
    host_gb: float | None = None
    """Pinned host memory of a GPU; None: the profile's."""
    kernels: Kernels = field(default_factory=Kernels)
    """Kernels of every layout."""
    teachers: tuple[FrozenModel, ...] = ()
    """Teachers of every layout."""
    given: Layout = field(default_factory=lambda: Layout(global_batch=1, micro_batch=1))
    """Whatever else every layout has."""

    @property
    def host_bytes(self) -> float:
        """The same in bytes."""
        return 1e9 * (self.cluster.hardware.host_gb if self.host_gb is None else self.host_gb)

    @property
    def fp8_multiple(self) -> int:
        """What every side of a product in fp8 is a multiple of."""
        return FP8_MULTIPLES[self.cluster.hardware.fp8_recipe]

    @property
    def pairs_multiple(self) -> int:
        """Pairs of which a GPU has a multiple where every DP and, in fp8, every product divides."""
        if not self.kernels.fp8:
            return 1
        tokens = self.frames * self.model.vision.kept_tokens(self.patch_dropout)
        return self.fp8_multiple // math.gcd(self.fp8_multiple, tokens)

    @property
    def whole_batch(self) -> int:
        """The nearest batch of which every GPU has such a multiple."""
        multiple = self.cluster.gpus * self.pairs_multiple
        return max(1, round(self.global_batch / multiple)) * multiple

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
    leading: dict[tuple[int, int], list[Estimate]] = defaultdict(list)
    priced_of: Counter[tuple[int, int]] = Counter()
    smallest: tuple[Memory, Layout] | None = None
    tried = 0
    for least, candidate in counted("filling memory", _promising_first(job), "layouts"):
        tried += 1
        place = candidate.tensor, candidate.pipeline
        if leading[place] and (least > leading[place][0].time.total or priced_of[place] >= MOST_PRICED):
            continue
        for layout, memory in filled(job, _with_recompute(job, _with_captions(job, candidate))):
            if memory.total > job.cluster.hardware.usable_bytes:
                if smallest is None or memory.total < smallest[0].total:
                    smallest = memory, layout
                continue
            found = priced(job.model, layout, job.cluster, memory)
            priced_of[place] += 1
            leading[place] = sorted([*leading[place], found], key=speed)[:REFINED]
    if not tried:
        raise PlanError(_nothing_divides(job))
    fitting, nearest = [entries for entries in leading.values() if entries], None
    if not fitting and smallest is not None:
        nearest = priced(job.model, smallest[1], job.cluster, smallest[0])
    refined = [min((with_fewer_captions(job, entry) for entry in entries), key=speed) for entries in fitting]
    return Found(best=sorted(refined, key=speed), tried=tried, nearest=nearest)


def _promising_first(job: Job) -> list[tuple[float, Layout]]:
    """Candidates with `least_seconds`."""
    listed = counted("bounding times", list(candidates(job)), "layouts")
    return sorted(((least_seconds(job, one), one) for one in listed), key=itemgetter(0))


def speed(entry: Estimate) -> tuple[float, float]:
    """Step time; between layouts that wait for the decoding CPUs alike, what the GPUs take."""
    return round(entry.time.total, 6), entry.time.total - entry.time.input


def least_seconds(job: Job, layout: Layout) -> float:
    """What no amount of memory makes shorter: the step without a replay, whoever decodes."""
    time = step_time(job.model, replace(layout, keep=layout.micro_batches), job.cluster)
    return time.total - time.input


def candidates(job: Job) -> Iterator[Layout]:
    """Every layout that engine/config/read.py accepts, with nothing kept."""
    tokens = job.model.vision.kept_tokens(job.patch_dropout)
    for layout in _cuts(job):
        sizes = [n for n in _divisors(layout.local_batch) if n * job.frames <= MOST_IMAGES]
        large = [n for n in sizes if n * job.frames * tokens >= FEWEST_TOKENS]
        for samples in large or sizes:
            one = replace(layout, micro_batch=samples * job.frames)
            if one.virtual > 1 and one.shard == "optimizer":
                if one.micro_batches < one.pipeline:
                    continue
                one = replace(one, group_size=one.micro_batches)
            for sequence in (True, False) if one.tensor > 1 else (True,):
                if sequence and one.packed_tokens(job.model.vision) % one.tensor:
                    continue
                cut = replace(one, sequence=sequence)
                if not job.kernels.fp8 or _divides_in_fp8(job, cut):
                    yield cut


def _divides_in_fp8(job: Job, layout: Layout) -> bool:
    """Whether the engine takes the layout's products with the recipe that the plan would be written with."""
    own = layout.packed_tokens(job.model.vision) // (layout.tensor if layout.splits_tokens else 1)
    return odd_in_fp8(job.model.vision, own, layout.tensor, job.fp8_multiple) is None


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
            for virtual, shares in _chunks_and_shares(job, tensor, pipeline, data):
                counts = balanced_layers(job.model, stages=pipeline, virtual=virtual, tokens=tokens)
                even = counts == even_layers(vision.depth, pipeline * virtual)
                for shard, neighbours in shares:
                    yield replace(
                        job.given,
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual=virtual,
                        data=data,
                        global_batch=job.global_batch,
                        micro_batch=job.frames,
                        frames=job.frames,
                        patch_dropout=job.patch_dropout,
                        shard=shard,
                        shard_ranks=neighbours,
                        layers=None if even else tuple(counts),
                        kernels=job.kernels,
                        teachers=job.teachers,
                    )


Shares = list[tuple[str, int | None]]
"""(parallel.shard, parallel.shard_ranks)."""


def _chunks_and_shares(job: Job, tensor: int, pipeline: int, data: int) -> Iterator[tuple[int, Shares]]:
    """v, and what may be shared then: more than states pays where a chunk is a small part of a rank's blocks."""
    blocks = job.model.vision.depth // pipeline
    few = min(MOST_CHUNKS, blocks) if pipeline > 1 else 1
    neighbours = job.cluster.per_node // tensor
    more: Shares = []
    if data > 1:
        more = [("weights", None), ("gradients", None)]
        if 1 < neighbours < data and data % neighbours == 0:
            more.append(("weights", neighbours))
    many = {blocks, -(-blocks // 2), -(-blocks // 4)} - {1}
    for virtual in sorted({*range(1, few + 1), *many}):
        shares: Shares = [("optimizer", None)] if virtual <= few else []
        if virtual in many:
            shares += more
        if shares:
            yield virtual, shares


def _with_captions(job: Job, layout: Layout) -> Layout:
    """As many captions a pass as need no more memory than a micro-batch of images."""
    stages = telling_stages(stages_of(job.model, layout))
    live = max(
        micro_batch_saved_bytes(job.model, layout, stage) + vision_temporary_bytes(job.model, layout, stage)
        for stage in stages
    )
    each = text_saved_bytes(job.model, 1, layout.element_bytes, layout.kernels.of_captions)
    fitting = max(1, int(live / each))
    passes = -(-layout.own_rows // fitting)
    return replace(layout, text_micro_batch=-(-layout.own_rows // passes))


def _with_recompute(job: Job, layout: Layout) -> Layout:
    fits = peak_memory(job.model, layout).total <= job.cluster.hardware.usable_bytes
    return layout if fits else replace(layout, recompute="full")


def filled(job: Job, layout: Layout) -> Iterator[tuple[Layout, Memory]]:
    """Ways to use the memory that a layout leaves, each with what it then needs."""
    yield with_kept(job, layout)
    if job.kernels.fp8 or layout.recompute == "full":
        return
    room = job.cluster.hardware.usable_bytes - peak_memory(job.model, layout).total
    if room > 0:
        kept = replace(layout, outputs_budget_gb=_rounded_gb(room))
        yield kept, peak_memory(job.model, kept)
    if job.host_bytes:
        for stashed in (False, True) if trains_images(job.model, layout) else (False,):
            there = replace(layout, offload_stash=stashed and layout.pipeline * layout.virtual > 1)
            if stashed and not there.offload_stash:
                break
            gigabytes = _host_outputs_gb(job, there)
            if gigabytes < 0:
                continue
            if gigabytes > 0:
                there = replace(there, outputs_budget_gb=gigabytes, offload_outputs=True)
            yield with_kept(job, there)


def _host_outputs_gb(job: Job, layout: Layout) -> float:
    """Outputs that host memory holds and the encode phase hides, beside the stash; below 0 where that is too much."""
    inner = telling_stages(stages_of(job.model, layout))[-1]
    unit = unit_time(job.model, layout, inner, job.cluster)
    hidden = HIDDEN * layout.micro_batches * unit.f * job.cluster.hardware.pcie_all_gb_s * 1e9
    return _rounded_gb(min(job.host_bytes, hidden) - host_bytes(job.model, layout, inner))


def _rounded_gb(room: float) -> float:
    return math.floor(room / 1e8) / 10


def with_kept(job: Job, layout: Layout) -> tuple[Layout, Memory]:
    """The layout with the largest k that fits, and its memory; k = 0 where that does not fit either."""
    base = peak_memory(job.model, layout)
    room = job.cluster.hardware.usable_bytes - base.total
    if room < 0 or layout.recompute == "full":
        return layout, base
    one, two = (peak_memory(job.model, replace(layout, keep=keep)).total for keep in (1, 2))
    # A replay is all that offloading and kept outputs are for.
    limit = layout.micro_batches - (layout.offload_stash or layout.keeps_outputs)
    most = min(limit, 1 + int(room / max(1.0, two - one)))
    for keep in range(most, max(0, most - 3), -1):
        kept = replace(layout, keep=keep)
        memory = peak_memory(job.model, kept)
        if memory.total <= job.cluster.hardware.usable_bytes:
            return kept, memory
    return layout, base


def with_fewer_captions(job: Job, entry: Estimate) -> Estimate:
    """The same with passes of fewer captions, if what then fits saves more than the passes cost."""
    layout, tried = entry.layout, [entry]
    assert layout is not None
    captions = layout.captions_at_once
    bare = replace(layout, keep=0, outputs_budget_gb=None, offload_outputs=False, offload_stash=False)
    while captions > 8:
        captions = -(-captions // 2)
        for fewer, memory in filled(job, replace(bare, text_micro_batch=captions)):
            if memory.total <= job.cluster.hardware.usable_bytes:
                tried.append(priced(job.model, fewer, job.cluster, memory))
    return min(tried, key=speed)


def _nothing_divides(job: Job) -> str:
    gpus, batch, vision = job.cluster.gpus, job.global_batch, job.model.vision
    if job.kernels.fp8:
        return (
            f"no layout of {gpus} GPUs divides --global-batch {batch} into micro-batches whose tokens are multiples of "
            f"{job.fp8_multiple}, as fp8 needs: take {job.whole_batch}"
        )
    return (
        f"no TP × PP × DP of {gpus} GPUs divides --global-batch {batch} and the model ({vision.depth} blocks, "
        f"{vision.heads} heads, MLP {vision.mlp_hidden}, TP within nodes of {job.cluster.per_node}): "
        f"take a multiple of the GPUs, such as {job.whole_batch}"
    )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
