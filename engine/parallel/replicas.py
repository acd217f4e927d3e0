"""megatron-core's part in replicas: flat buckets of weights and gradients, reduced and gathered over the data axis.

The one place of the engine that imports its DistributedDataParallel and its collection of process groups; the names
below are what the rest of the engine says instead.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from engine.config.schema import ParallelConfig

Buckets: TypeAlias = DistributedDataParallel
"""A module whose trained parameters lie in flat buckets, with fp32 gradient sums beside them."""
Groups: TypeAlias = ProcessGroupCollection
"""Process groups of megatron-core's layers and buckets."""


def groups_of(*, tensor: dist.ProcessGroup, data: dist.ProcessGroup, alone: dist.ProcessGroup) -> Groups:
    """Groups of a part of the model; stages are cut by models/towers, so megatron-core is told of a pipeline of one."""
    return ProcessGroupCollection(tp=tensor, dp=data, dp_cp=data, cp=alone, pp=alone, ep=alone, expt_dp=alone)


_SMALLEST_BUCKET, _A_RANK, _BUCKETS = 40_000_000, 1_000_000, 8
"""Elements: megatron-core's own bucket, at least and a rank; buckets of a part that is larger."""


def bucket_elements(module: nn.Module, data_ranks: int) -> int:
    """Elements of a gradient bucket: megatron-core's choice, which grows with the ranks, but an eighth of the module.

    With thousands of ranks its buckets are larger than the caption tower, and nothing of a reduction is hidden behind
    the backward that makes one bucket.
    """
    elements = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    usual = max(_SMALLEST_BUCKET, _A_RANK * data_ranks)
    return min(usual, max(_SMALLEST_BUCKET, elements // _BUCKETS))


def in_buckets(module: nn.Module, transformer_config, groups: Groups, parallel: ParallelConfig) -> Buckets:
    """Flat buckets, fp32 gradient sums, reduce-scatter and all-gather over the data axis of `groups`."""
    overlap = parallel.overlap and groups.dp.size() > 1
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and parallel.shard != "weights",
        bucket_size=parallel.bucket_size or (bucket_elements(module, groups.dp.size()) if overlap else None),
    )
    buckets = DistributedDataParallel(transformer_config, settings, module, pg_collection=groups)
    if settings.overlap_param_gather:
        for unit in _units(module):
            _have_weights_before(unit, buckets)
    one_by_one = groups.dp.size() > 1 and dist.get_backend(groups.dp) == "gloo"
    for group in buckets.bucket_groups:
        if one_by_one:
            group.start_param_sync = _GatherOneByOne(group, groups.dp).start
        if parallel.reduce_dtype == "bf16" and groups.dp.size() > 1:
            group.start_grad_sync = _ReduceInBf16(group, groups.dp).start
        # Fresh weights are the same everywhere; without this the first forward would gather them, and an evaluation
        # in which some ranks have nothing to do would wait for ever.
        group.param_gather_dispatched = True
    return buckets


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks, and the largest modules beside them."""
    if isinstance(module, TransformerLayer) or not any(isinstance(m, TransformerLayer) for m in module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _units(child)


def _have_weights_before(unit: nn.Module, buckets: Buckets) -> None:
    """Have a module wait for the gathers of all its new weights before it runs.

    megatron-core waits where the module is called that holds a weight itself. Fused blocks call none of theirs, a
    compiled norm is not called where it adds the residual, nor the linear of an attention pool: they would read old
    weights, or a mixture.
    """
    groups = {buckets.param_to_bucket_group[p] for p in unit.parameters() if p in buckets.param_to_bucket_group}

    def wait(*_: Any) -> None:
        for group in groups:
            group.finish_param_sync(skip_next_bucket_dispatch=True)

    if groups:
        unit.register_forward_pre_hook(wait)


class FrozenBuffer:
    """Parameters of one dtype that are not trained, in one flat tensor without gradients: a buffer of one bucket.

    Attributes are named as those of megatron-core's buffers and buckets, so that slices are found in the same way.
    """

    offset = 0
    """Element of the buffer at which the bucket begins."""

    def __init__(self, parameters: list[nn.Parameter], owners: int):
        """Moves the parameters into the flat tensor, which `owners` ranks cut into equal slices."""
        ends = list(accumulate((parameter.numel() for parameter in parameters), initial=0))
        self.params_list = parameters
        places = zip(parameters, pairwise(ends), strict=True)
        self.param_index_map = {parameter: (start, stop, 0) for parameter, (start, stop) in places}
        padded = -(-ends[-1] // (owners * _ALIGNED)) * owners * _ALIGNED
        self.param_data = torch.zeros(padded, dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, (start, stop, _) in self.param_index_map.items():
            place = self.param_data[start:stop].view(parameter.shape)
            place.copy_(parameter.data)
            parameter.data = place
        self.buckets = [self]


_ALIGNED = 64
"""Elements: slices begin where wide loads do."""


def frozen_buffers(groups: Iterable[Iterable[nn.Parameter]], owners: int) -> list[FrozenBuffer]:
    """Buffers of the parameters of each group that are not trained, one a dtype."""
    buffers = []
    for group in groups:
        frozen = sorted((p for p in group if not p.requires_grad), key=lambda p: str(p.dtype))
        by_dtype = groupby(frozen, key=lambda p: p.dtype)
        buffers += [FrozenBuffer(list(parameters), owners) for _, parameters in by_dtype]
    return buffers


def start_gather(whole: Tensor, own: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    """Start to bring the ranks' slices into `whole`, in their order; `own` may lie there. Collective over the group.

    On gloo each rank broadcasts its slice: gloo's own all-gather copies everything twice more, through fresh memory
    (measured, 60 MB on four ranks of two cores: 0.12 against 0.37 CPU s). engine/parallel/traffic.py counts the
    broadcasts as a gather, since nothing else is broadcast in groups of owners.
    """
    if dist.get_backend(group) != "gloo":
        works = [dist.all_gather_into_tensor(whole, own, group=group, async_op=True)]
    else:
        slices = whole.view(-1).chunk(group.size())
        if slices[group.rank()].data_ptr() != own.data_ptr():
            slices[group.rank()].copy_(own)
        works = [dist.broadcast(part, group_src=rank, group=group, async_op=True) for rank, part in enumerate(slices)]
    return [work for work in works if work is not None]


class _GatherOneByOne:
    """Takes the place of a bucket group's gather of new weights on gloo: in place, bucket by bucket, not coalesced.

    A gloo group of torch 2.13 keeps the name of the collective that ended last in one string, which its two threads
    write without a lock, after those that wait have been woken. Names up to 15 letters lie in the string itself; that
    of a coalesced gather is longer, so that one which ends beside another frees or overwrites memory of others
    (measured: docs/results/reliability.md). No other collective of the engine has such a name.
    """

    def __init__(self, group: Any, owners: dist.ProcessGroup):
        """group: of buckets, of megatron-core; owners: ranks that own a slice of each."""
        self.group, self.owners = group, owners
        self._megatron_start = group.start_param_sync

    def start(self, force_sync: bool = False) -> None:
        """Start the gathers, and without overlap wait for them; `param_gather_handle` does it otherwise."""
        group = self.group
        if force_sync and group.param_gather_handle is not None:
            self._megatron_start(force_sync=True)  # waits for those under way
            return
        assert group.param_gather_handle is None, "one gather at a time"
        rank, size = self.owners.rank(), self.owners.size()
        wholes = [bucket.param_data for bucket in group.buckets]
        works = _Gathers(
            work for whole in wholes for work in start_gather(whole, whole.view(size, -1)[rank], self.owners)
        )
        if group.ddp_config.overlap_param_gather and not force_sync:
            group.param_gather_handle = works
        else:
            works.wait()
        group.param_gather_dispatched = True


class _Gathers:
    """Gathers under way."""

    def __init__(self, works: Iterable[dist.Work]):
        self.works = list(works)

    def wait(self) -> None:
        """Have the weights here."""
        for work in self.works:
            work.wait()


class _ReduceInBf16:
    """Takes the place of a bucket group's reduce-scatter: gradients travel in bf16 and are added up in fp32.

    A rank sends each other rank that one's slice of its fp32 sums, rounded once, and adds to its own, which is not
    rounded, what comes, in the order of the ranks: each gradient is off by at most 2^-8 of what the other ranks put
    into it. A reduce-scatter in bf16 would send as many bytes and round every partial sum.
    """

    def __init__(self, group: Any, owners: dist.ProcessGroup):
        """group: of buckets, of megatron-core; owners: ranks that own a slice of each."""
        self.group, self.owners = group, owners

    def start(self, force_all_reduce: bool | None = False) -> None:
        """Send the slices, and without overlap add up what comes; `grad_reduce_handle` does it otherwise."""
        assert not force_all_reduce, "every rank owns a slice"
        group = self.group
        if group.is_first_batch and group.grad_reduce_handle is not None:
            return  # of the first batch megatron-core asks again when it is over
        arriving = [self._send(bucket) for bucket in group.buckets]
        if group.ddp_config.overlap_grad_reduce:
            group.grad_reduce_handle = _Arriving(arriving)
        else:
            _Arriving(arriving).wait()

    def _send(self, bucket: Any) -> tuple[dist.Work, Tensor, Sequence[Tensor], Tensor]:
        """(work, what is sent and must stay until then, what comes from the others, own slice)."""
        if bucket.gradient_scaling_factor != 1.0:
            bucket.grad_data.mul_(bucket.gradient_scaling_factor)
        sent = bucket.grad_data.to(torch.bfloat16)
        came = torch.empty_like(sent)
        work = dist.all_to_all_single(came, sent, group=self.owners, async_op=True)
        assert work is not None, "this rank owns a slice"
        rank, size = self.owners.rank(), self.owners.size()
        others = [slice_ for number, slice_ in enumerate(came.view(size, -1)) if number != rank]
        return work, sent, others, bucket.grad_data.view(size, -1)[rank]


class _Arriving:
    """Slices on their way."""

    def __init__(self, arriving: Sequence[tuple[dist.Work, Tensor, Sequence[Tensor], Tensor]]):
        self.arriving = arriving

    def wait(self) -> None:
        """Add them up; their memory is free behind it."""
        for work, _, others, own in self.arriving:
            work.wait()
            for slice_ in others:
                own.add_(slice_)
        self.arriving = ()
