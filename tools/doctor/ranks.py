"""One matrix product and one collective on every rank, their results against known ones, their speed side by side."""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.device import Device
from engine.parallel.mesh import Axis, Mesh, meet
from tools.doctor.rows import NOTE, WRONG, Row

ROUNDS = 3
SLOW = 0.7
"""Share of the median speed below which a rank is named."""
_MIB = 1 << 20


def rank_rows(mesh: Mesh, device: Device) -> list[Row]:
    """Collective over the mesh; every rank gets the rows."""
    side = 4096 if device.is_cuda else 512
    elements = (64 if device.is_cuda else 1) * _MIB // 4
    name, axis = device.torch_device, mesh.world
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    product, expected = _known_product(side, dtype, name)
    gemm_s, gemm_ok = _fastest(lambda: bool((product() == expected).all()), mesh, device)
    summands = torch.full((elements,), float(axis.rank + 1), device=name)
    total = axis.size * (axis.size + 1) / 2
    sum_s, sum_ok = _fastest(lambda: _sums_to(summands, total, axis), mesh, device)
    tflops, gb_s = 2 * side**3 / gemm_s / 1e12, elements * 4 / sum_s / 1e9
    return [
        _row(f"product {side} × {side}, {str(dtype)[6:]}", "TFLOP/s", tflops, gemm_ok, axis, name),
        _row(f"sum of {elements * 4 // _MIB} MiB, {device.backend}", "GB/s", gb_s, sum_ok, axis, name),
    ]


def _known_product(side: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A product whose every partial sum is a whole number up to 256, so exact in bf16 however a kernel splits it."""
    places = torch.arange(side, device=device)
    counted = places % (side // 64) == 0
    row, column = torch.where(counted, places % 3 + 1, 0), torch.where(counted, 1, 7)
    left, right = (values.to(dtype).repeat(side, 1) for values in (row, column))
    return lambda: left @ right.T, int((row * column).sum())


def _sums_to(summands: Tensor, total: float, axis: Axis) -> bool:
    work = summands.clone()
    dist.all_reduce(work, group=axis.group)
    return bool((work == total).all())


def _fastest(check: Callable[[], bool], mesh: Mesh, device: Device) -> tuple[float, bool]:
    """(seconds of the fastest round, whether every round was right); one round before them warms up."""
    right, seconds = check(), []
    for _ in range(ROUNDS):
        meet(mesh.world, device.torch_device)
        start = device.clock_s()
        right &= check()
        seconds.append(device.clock_s() - start)
    return min(seconds), right


def _row(what: str, unit: str, speed: float, right: bool, axis: Axis, device: torch.device) -> Row:
    own = torch.tensor([speed, float(right)], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(axis.size)]
    dist.all_gather(everyone, own, group=axis.group)
    speeds = [float(value[0]) for value in everyone]
    wrong = [rank for rank, value in enumerate(everyone) if not value[1]]
    median = statistics.median(speeds)
    text = f"{median:.3g} {unit}, {min(speeds):.3g} to {max(speeds):.3g} on {axis.size} rank(s)"
    if wrong:
        return Row(what, f"wrong numbers on ranks {wrong}", WRONG, "take these devices out of the job")
    if slow := [rank for rank, value in enumerate(speeds) if value < SLOW * median]:
        advice = f"ranks {slow} are below {SLOW:.0%} of the median: a step waits for its slowest rank"
        return Row(what, text, NOTE, advice)
    return Row(what, text)
