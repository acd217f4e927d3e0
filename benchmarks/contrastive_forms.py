"""The forms of the contrastive loss that the benchmark compares, and one measurement of one of them.

Memory is the rise of a rank's peak resident memory (VmHWM, reset after the inputs and a warm-up on a few
rows) over its resident memory before the call, the highest of the ranks. Time is wall time between barriers.
Linux only.
"""

import multiprocessing as mp
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import reset_peak, resident_bytes
from engine.objectives.contrastive.softmax import contrastive_loss
from engine.objectives.contrastive.tiles import DEFAULT_TILE_CPU, KEEP_BYTES

SCALE = 100.0
WARM_UP_ROWS = 16
RUNS_WITHIN_S = 1.0
PROCESS_TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured configuration."""

    form: str
    """A key of FORMS."""
    ranks: int
    width: int
    """Embedding width D."""
    batch: int
    """Global batch B."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one fresh set of ranks measured."""

    time_s: float
    memory_bytes: int
    loss: float


# The forms: image and text [b, D] of this rank, explicit group (None: one process) -> global mean loss.


def _strips_loss(strips: list[tuple[Tensor, Tensor]], first_label: int) -> Tensor:
    logits = [SCALE * rows @ columns.t() for rows, columns in strips]
    labels = torch.arange(first_label, first_label + logits[0].shape[0])
    return sum(F.cross_entropy(strip, labels) for strip in logits) / 2  # type: ignore[return-value]


def _gather_with_grad(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return rows if group is None else torch.cat(dist_nn.all_gather(rows, group=group))


def _local_loss(image: Tensor, text: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    image, text = image.requires_grad_(), text.requires_grad_()
    images, texts = _gather_with_grad(image, group), _gather_with_grad(text, group)
    first = 0 if group is None else dist.get_rank(group) * image.shape[0]
    loss = _strips_loss([(image, texts), (text, images)], first)
    loss.backward()
    return _mean_over_ranks(loss.detach(), group)


def _full_matrix(image: Tensor, text: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    image, text = image.requires_grad_(), text.requires_grad_()
    images, texts = _gather_with_grad(image, group), _gather_with_grad(text, group)
    logits = SCALE * images @ texts.t()
    labels = torch.arange(logits.shape[0])
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    del logits
    loss.backward()
    return loss.detach()


def _mean_over_ranks(loss: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(loss, group=group)
        loss /= dist.get_world_size(group)
    return loss


def _ours(variant: Any) -> Callable[..., Tensor]:
    return lambda image, text, group: contrastive_loss(image, text, SCALE, group, variant=variant).loss


FORMS: dict[str, Callable[..., Tensor]] = {
    "full_matrix": _full_matrix,
    "local_loss": _local_loss,
    "gather": _ours("gather"),
    "ring": _ours("ring"),
}


def computed_bytes(case: Case) -> int:
    """Extra float32 memory of one rank by formula, gradients of the inputs included."""
    rows, batch, width = case.batch // case.ranks, case.batch, case.width
    gathered = 0 if case.ranks == 1 else batch * width
    own = 2 * rows * width
    tile = min(DEFAULT_TILE_CPU, rows)
    kept = rows * batch if 4 * rows * batch <= KEEP_BYTES else 0
    ours = 2 * tile * tile + kept + own
    elements = {
        "full_matrix": 4 * batch * batch + 4 * gathered + own,  # logits or its gradient, three of log-softmax
        "local_loss": 4 * rows * batch + 4 * gathered + own,
        "gather": ours + 2 * gathered,  # gloo gathers through a copy
        "ring": ours + (0 if case.ranks == 1 else 2 * rows * width),
    }
    return 4 * elements[case.form]


# One measurement: a fresh set of ranks.


def measure(case: Case, threads: int) -> Measurement:
    """Run a case on its ranks; raises RuntimeError when a rank dies."""
    context = mp.get_context("forkserver")  # torch is imported once, every process is still fresh
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(case, rank, threads, f"{folder}/store", sender))
            for rank in range(case.ranks)
        ]
        for process in ranks:
            process.start()
        sender.close()
        try:
            if not receiver.poll(PROCESS_TIMEOUT_S):
                raise RuntimeError(f"{case} gave no answer in {PROCESS_TIMEOUT_S:.0f} s")
            return receiver.recv()
        except EOFError:
            raise RuntimeError(f"{case}: its ranks died without an answer; out of memory?") from None
        finally:
            for process in ranks:
                process.join(10)
                process.kill()


def _rank_main(case: Case, rank: int, threads: int, store: str, sender: Connection) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # the peers' gather has a newer name in torch 2.13
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=case.ranks,
        timeout=timedelta(seconds=PROCESS_TIMEOUT_S),
    )
    group = dist.group.WORLD if case.ranks > 1 else None
    form = FORMS[case.form]
    form(*_inputs(WARM_UP_ROWS, case.width, rank), group)
    image, text = _inputs(case.batch // case.ranks, case.width, rank)
    before = reset_peak()
    times: list[float] = []
    memory = 0
    while not times or sum(times) + times[-1] < RUNS_WITHIN_S:
        image.grad = text.grad = None
        dist.barrier(group=dist.group.WORLD)
        start = time.perf_counter()
        loss = form(image, text, group)
        dist.barrier(group=dist.group.WORLD)
        times.append(time.perf_counter() - start)
        memory = memory or resident_bytes("VmHWM") - before
        dist.broadcast(agreed := torch.tensor(times), src=0, group=dist.group.WORLD)
        times = agreed.tolist()
    report = torch.tensor([statistics.median(times), memory, loss.item()], dtype=torch.float64)
    dist.all_reduce(report, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    if rank == 0:
        time_s, memory_bytes, value = report.tolist()
        sender.send(Measurement(time_s=time_s, memory_bytes=int(memory_bytes), loss=value))
    dist.destroy_process_group()


def _inputs(rows: int, width: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    image = F.normalize(torch.randn(rows, width, generator=generator), dim=1)
    # Pairs about as similar as the best of the strangers, so that the loss is neither 0 nor ln B.
    noise = 5.5 * torch.randn(rows, width, generator=generator) / width**0.5
    return image, F.normalize(image + noise, dim=1)
