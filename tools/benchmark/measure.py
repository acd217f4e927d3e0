"""Measuring a configuration on this rank: peak, warm-up, timed steps, traced steps. Collective over the mesh."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from engine.config.phases import first_phase
from engine.config.read import Config, to_dict
from engine.feed import Feed, LocalBatch
from engine.objectives.contrastive.step import ContrastiveStep
from engine.parallel.agree import everyone
from engine.parallel.device import Device
from engine.parallel.mesh import Mesh
from engine.trainer import Trainer
from tools.benchmark.machine import machine
from tools.benchmark.options import TRACED_STEPS, Options
from tools.benchmark.peak import peak_flops_per_s
from tools.benchmark.result import Result, Spread
from tools.benchmark.synthetic import SyntheticFeed
from tools.cost.work import executed_flops, model_flops, tokens_per_sample


class BatchFeed(Protocol):
    """engine.feed.Feed or SyntheticFeed."""

    def __iter__(self) -> Iterator[LocalBatch]: ...
    def __next__(self) -> LocalBatch: ...
    def close(self) -> None:
        """End reader processes."""
        ...


@dataclass(frozen=True)
class _Step:
    """A step on this rank."""

    seconds: float
    data_s: float
    loss: float
    phases_s: dict[str, float]


def measure(config: Config, mesh: Mesh, device: Device, options: Options) -> Result:
    """Train on `config` from fresh weights and time it; the same result on every rank."""
    if mesh.world.rank == 0:
        shutil.rmtree(options.out / "timeline", ignore_errors=True)  # spans of an earlier, perhaps larger, job
    peak, peak_source = peak_flops_per_s(config.train.precision, mesh, device, options.gemm_side)
    trainer = Trainer(first_phase(config), mesh, device)
    feed = _open_feed(config, mesh, device, options)
    try:
        steps = [_step(trainer, feed, device) for _ in range(options.total_steps)]
        trainer.towers.wait_for_weights()
    finally:
        feed.close()
    timed = steps[options.warmup : -TRACED_STEPS]
    seconds, waited = (
        _slowest([getattr(step, name) for step in timed], mesh, device) for name in ("seconds", "data_s")
    )
    step_s = Spread.of(seconds)
    model, executed = model_flops(config), _executed(config, trainer, mesh)
    samples_per_s = config.train.global_batch_size / step_s.median
    return Result(
        machine=machine() | {"device": _device_name(device)},
        config=to_dict(config),
        world_size=mesh.world.size,
        layout=mesh.layout,
        threads=torch.get_num_threads(),
        data=options.data,
        warmup_steps=options.warmup,
        step_s=step_s,
        step_times_s=seconds,
        data_s=Spread.of(waited).median,
        samples_per_s=samples_per_s,
        tokens_per_s=samples_per_s * tokens_per_sample(config),
        model_flops_per_sample=model,
        executed_flops_per_sample=executed,
        peak_flops_per_s=peak,
        peak_source=peak_source,
        mfu=samples_per_s * model / peak,
        hfu=samples_per_s * executed / peak,
        phases_s=_mean_phases(steps[-TRACED_STEPS:], mesh),
        peak_memory_gb=everyone(device.peak_memory_gb(), mesh.world),
        losses=[steps[0].loss, steps[-1].loss],
    )


def _open_feed(config: Config, mesh: Mesh, device: Device, options: Options) -> BatchFeed:
    if options.data == "synthetic":
        return SyntheticFeed(config, mesh, device.torch_device)
    return Feed(config, mesh, device.torch_device, start_position=0, steps=options.total_steps)


def _step(trainer: Trainer, feed: BatchFeed, device: Device) -> _Step:
    start = device.clock_s()
    batch = next(feed)
    fetched = device.clock_s()
    outcome, phases = trainer.traced_step(batch)
    loss = float(outcome.loss)
    return _Step(device.clock_s() - start, fetched - start, loss, dict(phases.seconds))


def _slowest(values: list[float], mesh: Mesh, device: Device) -> list[float]:
    """Each value on the rank where it is largest."""
    most = torch.tensor(values, dtype=torch.float64, device=device.torch_device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mesh.world.group)
    return most.tolist()


def _mean_phases(steps: list[_Step], mesh: Mesh) -> dict[str, float]:
    """Seconds a step by phase, mean over steps and ranks."""
    recorded = [phases for of_rank in everyone([s.phases_s for s in steps], mesh.world) for phases in of_rank]
    names = sorted({name for phases in recorded for name in phases})
    return {name: sum(phases.get(name, 0.0) for phases in recorded) / len(recorded) for name in names}


def _executed(config: Config, trainer: Trainer, mesh: Mesh) -> float:
    """FLOPs a sample, mean over ranks: stages may keep different numbers of micro-batches."""
    kept_share, keeps_text = 1.0, True  # without a barrier (1F1B) nothing is replayed
    if isinstance(trainer.training_step, ContrastiveStep):
        step = trainer.training_step
        kept_share, keeps_text = step.keep / step.program.micro_batches, step.keeps_captions
    own = executed_flops(config, kept_share=kept_share, keeps_text=keeps_text)
    return sum(everyone(own, mesh.world)) / mesh.world.size


def _device_name(device: Device) -> str:
    return torch.cuda.get_device_name(device.torch_device) if device.is_cuda else "cpu"
