"""One rank of the layout benchmark (benchmarks/layouts.py starts it): times steps and counts what the rank sends."""

import argparse
import json
import os
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_sides import DROPOUT, FULL, QUICK, SCALE, Batch, Workload
from engine.config import Config, check_layout, resolve
from engine.feed import LocalBatch
from engine.launch import job
from engine.mesh import Mesh
from engine.rows import own_rows
from engine.trainer import Trainer

AXES = ("tensor", "pipeline", "data", "replica", "stage", "world")
# Argument of each c10d operator that holds what this rank puts in. Receiving operators put nothing in.
_PAYLOAD = {
    "allreduce_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "_allgather_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "send": 0,
}
_NOTHING = {"recv_", "barrier", "monitored_barrier_"}


class TrafficCounter(TorchDispatchMode):
    """Bytes of the tensors that this rank puts into each axis's collectives and messages."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.axis_of = {getattr(mesh, axis).group.group_name: axis for axis in AXES if getattr(mesh, axis).size > 1}
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Sees every operator, collectives included."""
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        axis = self.axis_of.get(group.group_name)
        if axis is None or name in _NOTHING:
            return
        if name == "broadcast_":
            sends = args[2] == dist.get_rank(group)
            self.bytes[axis] += _size(args[0]) if sends else 0
        elif name in _PAYLOAD:
            self.bytes[axis] += _size(args[_PAYLOAD[name]])
        else:
            raise NotImplementedError(
                f"the traffic of c10d.{name} is not counted yet: add it to benchmarks/layouts_rank"
            )


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size(part) for part in value)


def local_batch(workload: Workload, step: int, mesh: Mesh) -> LocalBatch:
    """This rank's part of a global batch that is the same for every layout."""
    batch = Batch.make(workload, step, "full")
    rows = workload.batch // mesh.data.size
    mine = slice(mesh.data.rank * rows, (mesh.data.rank + 1) * rows)
    positions = torch.arange(batch.first_position, batch.first_position + workload.batch)[mine].numpy()
    images = batch.images[mine] if mesh.is_first_stage else None
    return LocalBatch(positions=positions, images=images, tokens=batch.ids[mine][own_rows(rows, mesh)])


def measure(config: Config, workload: Workload, steps: int) -> dict[str, Any]:
    """Seconds and losses of each step, and bytes that all ranks sent in one more step, by axis."""
    with job(config.parallel) as (mesh, device):
        trainer = Trainer(config, mesh, device)
        losses, seconds = [], []
        for step in range(1 + steps):
            batch = local_batch(workload, step, mesh)
            dist.barrier(group=mesh.world.group)
            start = time.perf_counter()
            losses.append(float(trainer.step(batch).loss))
            dist.barrier(group=mesh.world.group)
            seconds.append(time.perf_counter() - start)
        with TrafficCounter(mesh) as traffic:
            trainer.step(local_batch(workload, 1 + steps, mesh))
        sent = torch.tensor([traffic.bytes[axis] for axis in AXES], dtype=torch.int64)
        dist.all_reduce(sent, group=mesh.world.group)
        sent_by_axis = {axis: value for axis, value in zip(AXES, sent.tolist(), strict=True) if value}
        return {"warm_up_s": seconds[0], "step_s": seconds[1:], "losses": losses, "sent_bytes": sent_by_axis}


def config_of(workload: Workload, options: list[str]) -> Config:
    """The job, with the layout as dotted overrides."""
    train = {
        "global_batch_size": workload.batch,
        "micro_batch_size": workload.micro_batch,
        "keep_activations": -1,
        "patch_dropout": DROPOUT,
        "logit_scale": SCALE,
    }
    return resolve({"model": asdict(workload.model), "data": {"shards": ["-"]}, "train": train}, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="where rank 0 writes its JSON")
    parser.add_argument("options", nargs="*", help="dotted.key=value, the layout among them")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    workload = replace(QUICK if arguments.quick else FULL, batch=arguments.batch)
    config = config_of(workload, arguments.options)
    check_layout(config, int(os.environ["WORLD_SIZE"]))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = measure(config, workload, arguments.steps)
    if os.environ["RANK"] == "0":
        with open(arguments.output, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main()
