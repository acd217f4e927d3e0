#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI), torch 2.13.0, two ranks on gloo.
# Guess: with overlap_param_gather the forward pass of its DistributedDataParallel has gathered new weights when it reads them.
# Behaviour: it waits in a hook of the module that holds a weight. A fused block, or an attention that hands its linear's
# weight to a function, calls no such module: nothing waits, and what is read are old weights or a part of the new ones.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
cat > "$work/ranks.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import nn

torch.cuda.current_device = lambda: "cpu"  # where its buffers are made


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.linear(x)


class Read(Called):
    def forward(self, x):
        return nn.functional.linear(x, self.linear.weight)


def under_way(kind, groups):
    """Whether a gather is still waited for behind the forward pass."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    transformer = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp = DistributedDataParallel(transformer, settings, nn.Sequential(kind()), pg_collection=groups)
    ddp.start_param_sync()
    ddp(torch.ones(1, 8))
    seen = any(group.param_gather_handle is not None for group in ddp.bucket_groups)
    ddp.start_param_sync(force_sync=True)
    return seen


def rank_main(rank):
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    data = dist.new_group([0, 1])
    alone = [dist.new_group([one]) for one in range(2)][rank]
    groups = ProcessGroupCollection(tp=alone, dp=data, dp_cp=data, cp=alone, pp=alone, ep=alone, expt_dp=data)
    called, read = under_way(Called, groups), under_way(Read, groups)
    if rank == 0:
        print(f"gather under way behind a linear that is called: {called}, whose weight is read: {read}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_main, nprocs=2)
PY
install torch==2.13.0 numpy==2.4.6 packaging==26.4 megatron-core==0.16.1
seen=$(GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 PYTHONPATH="$PACKAGES" "$python" -W ignore "$work/ranks.py" "$work/store" 2>"$work/err" | tail -1) ||
  { cat "$work/err" >&2; exit 1; }
expect "0.16.1" "a linear that is called: False, whose weight is read: True" "$seen"
