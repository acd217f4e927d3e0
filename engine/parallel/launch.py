"""Starting and ending a multi-rank command: device, process group, mesh."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from engine.config.read import ParallelConfig
from engine.parallel.device import Device, order_kernels_by_launch, prepare
from engine.parallel.mesh import Mesh, build_mesh, meet
from engine.parallel.rendezvous import own_store
from engine.parallel.standby import StoodBy, let_go, stand_by
from engine.resilience.agreement import agree
from engine.resilience.exit import crashes_leave_stacks
from engine.resilience.failures import note


@contextmanager
def job(
    parallel: ParallelConfig, facts: Mapping[str, str] | None = None, working: int | None = None
) -> Iterator[tuple[Mesh, Device]]:
    """The mesh and device of this rank; the process group ends with the block. One rank needs no torchrun.

    facts: what has to be the same on all ranks (engine/resilience/agreement.py); compared before any group is made.
    working: how many of the ranks the layout uses (None: all); the others stand by until these have ended and raise
    StoodBy. What is raised inside carries who tells it (engine/resilience/failures.py).
    """
    crashes_leave_stacks()
    if parallel.tensor > 1:
        order_kernels_by_launch()
    device = prepare()
    timeout = timedelta(minutes=parallel.timeout_minutes)
    start_timeout = timedelta(minutes=parallel.start_timeout_minutes)
    store, rank, size = own_store(start_timeout)
    try:
        if facts is not None:
            agree(store, rank, size, facts, start_timeout)
        used = working or size
        if rank >= used:
            stand_by(store)
            raise StoodBy
        dist.init_process_group(device.backend, store=store, rank=rank, world_size=used, timeout=timeout)
        world = dist.distributed_c10d._get_default_group()
        mesh = build_mesh(parallel.tensor, parallel.pipeline, world, timeout=timeout)
        yield mesh, device
        meet(mesh.world, device.torch_device)  # no rank closes its connections while another still uses them
    except StoodBy:
        raise
    except Exception as error:
        note(error, store)
        raise
    finally:
        if rank == 0:
            let_go(store)
        if dist.is_initialized():
            with suppress(RuntimeError):  # a group whose other ranks are gone
                dist.destroy_process_group()
