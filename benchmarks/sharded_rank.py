"""One rank of the benchmark of sharded weights (benchmarks/sharded.py starts it): times steps of one side.

Rank 0 writes, over all ranks: CPU-seconds of every step, its wall time, the loss, the largest peak of memory above what
the imports took, and what a rank holds between steps.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from benchmarks.common import reset_peak, resident_bytes
from benchmarks.layouts_rank import config_of, local_batch
from benchmarks.plain_clip import PlainClip, initialise
from benchmarks.step_sides import CLIP_NORM, FULL, QUICK, RATE, SCALE, SEED, Batch, Workload
from engine.config.phases import first_phase
from engine.config.read import ParallelConfig
from engine.parallel.device import Device
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh
from engine.trainer import Trainer

OURS = {
    "ours": ("parallel.shard=optimizer",),
    "ours_sharded": ("parallel.shard=weights", "parallel.virtual=4"),
    "ours_sharded_outputs": ("parallel.shard=weights", "parallel.virtual=4", "train.keep_outputs=all"),
}
FSDP = {
    "fsdp2": {"checkpointing": False, "accumulate": False},
    "fsdp2_checkpointing": {"checkpointing": True, "accumulate": False},
    "fsdp2_accumulate": {"checkpointing": False, "accumulate": True},
}
RATES = [f"optim.lr_{group}={RATE}" for group in ("vision", "text", "other")]
OPTIMIZER = ["optim.name=adamw", "optim.warmup_steps=0", f"optim.clip_grad_norm={CLIP_NORM}", *RATES]
COMMON = [
    "optim.layer_decay_vision=1",
    "optim.layer_decay_text=1",
    "train.keep_activations=0",
    "train.steps=1000000",
    f"train.seed={SEED}",
]


class Side(Protocol):
    """A way to train the workload on these ranks."""

    def step(self, number: int) -> float:
        """One optimizer step; the loss over the global batch."""

    def held_bytes(self) -> int:
        """Weights, gradients and optimizer state that this rank holds between steps."""


class Ours:
    """The engine, no activations kept from encoding to backward (k = 0)."""

    def __init__(self, workload: Workload, options: tuple[str, ...], mesh: Mesh, device: Device):
        config = config_of(workload, [*OPTIMIZER, *COMMON, *options])
        self.workload, self.mesh = workload, mesh
        self.trainer = Trainer(first_phase(config), mesh, device)

    def step(self, number: int) -> float:
        """Through Trainer.step."""
        return float(self.trainer.step(local_batch(self.workload, number, self.mesh)).loss)

    def held_bytes(self) -> int:
        """Storages of this process, each once."""
        return _bytes_of_tensors()


class Fsdp:
    """Plain PyTorch: fully_shard over all ranks, GradCache in micro-batches, the exact loss over the global batch."""

    def __init__(self, workload: Workload, *, checkpointing: bool, accumulate: bool):
        """checkpointing: every block again in backward. accumulate: gradients stay whole until the last micro-batch."""
        self.workload, self.accumulate = workload, accumulate
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.clip = PlainClip(workload.model, SCALE, checkpointing).train()
        initialise(self.clip, workload.model, SEED)
        for blocks in (self.clip.visual.blocks, self.clip.text.transformer["resblocks"]):
            for block in blocks.children():
                fully_shard(block)
        for tower in (self.clip.visual, self.clip.text):
            fully_shard(tower)
        self.optimizer = torch.optim.AdamW(
            self.clip.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0
        )

    def step(self, number: int) -> float:
        """Embeddings without a graph, the loss's gradients over all of them, then micro-batch by micro-batch."""
        batch = Batch.make(self.workload, number, "full")
        rows = self.workload.batch // self.ranks
        parts = torch.arange(self.rank * rows, (self.rank + 1) * rows).split(self.workload.micro_batch)
        kept = batch.kept(self.workload.model)
        with torch.no_grad():
            done = [self._embed(batch, kept, part) for part in parts]
        own = [torch.cat(values) for values in zip(*done, strict=True)]
        loss, gradients = self._loss(*own)
        self.optimizer.zero_grad()
        for index, part in enumerate(parts):
            self._reduce(index == len(parts) - 1 or not self.accumulate)
            rows_of_part = slice(index * self.workload.micro_batch, (index + 1) * self.workload.micro_batch)
            # fully_shard takes the mean over ranks; the gradients of one loss are summed.
            given = [self.ranks * gradient[rows_of_part] for gradient in gradients]
            torch.autograd.backward(self._embed(batch, kept, part), given)
        torch.nn.utils.clip_grad_norm_(self.clip.parameters(), CLIP_NORM)
        self.optimizer.step()
        return loss

    def _embed(self, batch: Batch, kept: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        image = self.clip.visual(batch.images[rows], kept[rows])
        return F.normalize(image, dim=-1), F.normalize(self.clip.text(batch.ids[rows]), dim=-1)

    def _reduce(self, now: bool) -> None:
        for tower in (self.clip.visual, self.clip.text):
            tower.set_requires_gradient_sync(now)  # type: ignore[operator]

    def _loss(self, image: Tensor, text: Tensor) -> tuple[float, list[Tensor]]:
        """The loss over all ranks' embeddings and its gradients for this rank's rows [B / ranks, D] each."""
        whole = [_gathered(part).requires_grad_() for part in (image, text)]
        logits = SCALE * whole[0] @ whole[1].t()
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
        own = slice(self.rank * len(image), (self.rank + 1) * len(image))
        return float(loss.detach()), [gradient[own] for gradient in torch.autograd.grad(loss, whole)]

    def held_bytes(self) -> int:
        """Storages of this process, each once."""
        return _bytes_of_tensors()


def _gathered(part: Tensor) -> Tensor:
    out = part.new_empty(len(part) * dist.get_world_size(), part.shape[1])
    dist.all_gather_into_tensor(out, part, group=dist.group.WORLD)
    return out


def _bytes_of_tensors() -> int:
    """Of every storage of this process with floating-point numbers of at most four bytes, each once: weights, gradients
    and optimizer state, without states of random numbers, counters and tables of lengths. A storage that was given back
    counts nothing.
    """
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and type(thing).__name__ != "FakeTensor":
            for tensor in (getattr(thing, "_local_tensor", thing), thing.grad if thing.is_leaf else None):
                if tensor is None or tensor.device.type != "cpu" or hasattr(tensor, "_local_tensor"):
                    continue
                if tensor.is_floating_point() and tensor.element_size() <= 4:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@contextmanager
def _side(name: str, workload: Workload) -> Iterator[Side]:
    with job(ParallelConfig()) as (mesh, device):
        yield Ours(workload, OURS[name], mesh, device) if name in OURS else Fsdp(workload, **FSDP[name])


def measure(name: str, workload: Workload, steps: int) -> dict[str, Any]:
    """Every step after one to warm up; CPU-seconds are summed over ranks, memory is the largest rank's."""
    before = reset_peak()
    rows = []
    with _side(name, workload) as side:
        for number in range(1 + steps):
            dist.barrier(group=dist.group.WORLD)
            wall, cpu = time.perf_counter(), time.process_time()
            loss = side.step(number)
            spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
            dist.all_reduce(spent, group=dist.group.WORLD)
            rows.append({"loss": loss, "wall_s": time.perf_counter() - wall, "cpu_s": float(spent)})
        memory = torch.tensor([resident_bytes("VmHWM") - before, side.held_bytes()], dtype=torch.int64)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    return {"side": name, "steps": rows, "peak_mb": memory[0].item() / 1e6, "held_mb": memory[1].item() / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=[*OURS, *FSDP])
    parser.add_argument("output", help="where rank 0 writes its JSON")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload = replace(QUICK if options.quick else FULL, batch=options.batch)
    result = measure(options.side, workload, options.steps)
    if os.environ["RANK"] == "0":
        with open(options.output, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main()
