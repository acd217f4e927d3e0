"""One rank of the layout benchmark (benchmarks/layouts.py starts it): times steps and counts what the rank sends."""

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step_sides import DROPOUT, FULL, QUICK, SCALE, Batch, Workload
from engine.config.phases import first_phase
from engine.config.read import Config, check_layout, resolve
from engine.feed import LocalBatch
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh
from engine.parallel.rows import own_rows
from engine.parallel.traffic import AXES, TrafficCounter
from engine.trainer import Trainer


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
        trainer = Trainer(first_phase(config), mesh, device)
        losses, seconds = [], []
        for step in range(1 + steps):
            batch = local_batch(workload, step, mesh)
            trainer.meet()
            start = time.perf_counter()
            losses.append(float(trainer.step(batch).loss))
            trainer.meet()
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
