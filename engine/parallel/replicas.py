"""megatron-core's part in replicas: flat buckets of weights and gradients, reduced and gathered over the data axis.

The one place of the engine that imports its DistributedDataParallel and its collection of process groups; the names
below are what the rest of the engine says instead.
"""

from typing import TypeAlias

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from engine.config.schema import ParallelConfig

Buckets: TypeAlias = DistributedDataParallel
"""A module whose parameters lie in flat buckets, with fp32 gradient sums beside them."""
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
    elements = sum(parameter.numel() for parameter in module.parameters())
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
    for group in buckets.bucket_groups:
        # Fresh weights are the same everywhere; without this the first forward would gather them, and an evaluation
        # in which some ranks have nothing to do would wait for ever.
        group.param_gather_dispatched = True
    return buckets
