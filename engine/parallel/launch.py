"""Starting and ending a multi-rank command: device, process group, mesh."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from engine.config.read import ParallelConfig
from engine.parallel.device import Device, order_kernels_by_launch, prepare
from engine.parallel.mesh import Mesh, build_mesh, meet


@contextmanager
def job(parallel: ParallelConfig) -> Iterator[tuple[Mesh, Device]]:
    """The mesh and device of this rank; the process group ends with the block. One rank needs no torchrun."""
    if parallel.tensor > 1:
        order_kernels_by_launch()
    device = prepare()
    timeout = timedelta(minutes=parallel.timeout_minutes)
    alone = "RANK" not in os.environ
    if alone:
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(device.backend, timeout=timeout)
    world = dist.distributed_c10d._get_default_group()
    try:
        mesh = build_mesh(parallel.tensor, parallel.pipeline, world, timeout=timeout)
        yield mesh, device
        meet(mesh.world, device.torch_device)  # no rank closes its connections while another still uses them
    finally:
        dist.destroy_process_group()
