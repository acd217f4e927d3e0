"""The denominator of an MFU: what the ranks' devices could do at most.

A GPU that the table knows counts as its vendor says (dense, boost clock). For everything else, CPUs above all, a large
matrix product is measured, on all ranks at the same time: ranks may share cores.
"""

import torch
import torch.distributed as dist

from engine.build import DTYPES
from engine.parallel.device import Device
from engine.parallel.mesh import Mesh, meet
from tools.benchmark.options import GEMM_SIDE

GEMM_ROUNDS = 4


def peak_flops_per_s(precision: str, mesh: Mesh, device: Device, gemm_side: int = GEMM_SIDE) -> tuple[float, str]:
    """(FLOP/s of all ranks together, where the number is from). Collective over the mesh."""
    if (tflops := device.peak_tflops(precision)) is not None:
        name = torch.cuda.get_device_name(device.torch_device)
        return mesh.world.size * tflops * 1e12, f"{name}: {tflops:g} TFLOP/s in {precision}, by its data sheet"
    rate = torch.tensor(_gemm_flops_per_s(precision, mesh, device, gemm_side), dtype=torch.float64)
    rate = rate.to(device.torch_device)
    dist.all_reduce(rate, group=mesh.world.group)
    side = f"{gemm_side} × {gemm_side}"
    return float(rate), f"measured: a {side} matrix product in {precision} on all ranks at once, best of {GEMM_ROUNDS}"


def _gemm_flops_per_s(precision: str, mesh: Mesh, device: Device, side: int) -> float:
    a, b = (torch.randn(side, side, device=device.torch_device).to(DTYPES[precision]) for _ in range(2))
    torch.mm(a, b)
    seconds = []
    for _ in range(GEMM_ROUNDS):
        meet(mesh.world, device.torch_device)
        start = device.clock_s()
        torch.mm(a, b)
        seconds.append(device.clock_s() - start)
    return 2 * side**3 / min(seconds)
