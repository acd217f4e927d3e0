"""Seconds of work before a job that takes weeks: does every rank compute, copy, send and write as the others do?

Each rank multiplies known numbers, copies memory and sums over every group of the layout; one rank a host writes to the
run folder's disk; clocks, shared memory and open files are compared. What is wrong, or slower than most, is named with
rank and host: a step waits for its slowest rank.
"""

import os
import resource
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.agree import everyone
from engine.parallel.device import Device
from engine.parallel.mesh import Axis, Mesh, meet

ROUNDS = 3
SLOW = 0.7
"""Share of the median speed below which a rank is named."""
CLOCKS_S = 5.0
"""Difference of clocks from which a log of several hosts cannot be read side by side."""
SHARED_MEMORY_GB = 1.0
"""Docker gives 0.064; NCCL takes about 10 MB a pair of ranks of a node, decoding workers a batch each."""
OPEN_FILES = 4096
"""Sockets of every pair of ranks, shards and checkpoint files."""
_MIB = 1 << 20
_SHOWN = 8


class UnfitRank(Exception):
    """A rank computes or sends wrong numbers; the message names it."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on every rank."""

    what: str
    found: str
    wrong: str = ""
    """Names of ranks whose numbers are wrong; empty: none."""
    advice: str = ""
    """Whoever stands out, and what to do about it."""


@dataclass(frozen=True)
class _Measured:
    """A speed of one rank. None: this rank took no part."""

    speed: float | None
    right: bool = True


def look_over(mesh: Mesh, device: Device, folder: Path | None = None) -> list[Finding]:
    """Look all ranks over; folder: whose disk is measured. Collective over the mesh; every rank gets the findings."""
    side, mib = (4096, 64) if device.is_cuda else (512, 1)
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    product = f"product {side} × {side}, {str(dtype)[6:]}"
    findings = [
        _speeds(product, "TFLOP/s", _product(side, dtype, mesh, device), mesh),
        _speeds("copy of memory", "GB/s", _copy(256 if device.is_cuda else 16, mesh, device), mesh),
    ]
    for name in ("tensor", "pipeline", "data", "world"):
        axis: Axis = getattr(mesh, name)
        if axis.size > 1 or name == "world":
            what = f"sum of {mib} MiB, {device.backend}, {name} axis"
            findings.append(_speeds(what, "GB/s", _sum(axis, mib, mesh, device), mesh))
    if folder is not None:
        findings.append(_speeds(f"writing to {folder}", "GB/s", _write(folder, mesh, device), mesh))
    return [*findings, _clocks(mesh), *_limits(mesh)]


def preflight(mesh: Mesh, device: Device, run_dir: Path) -> None:
    """Say in a line what was found, and warn of whoever stands out. Raises UnfitRank on every rank."""
    began = time.perf_counter()
    findings = look_over(mesh, device, run_dir)
    if mesh.world.rank == 0:
        seconds = time.perf_counter() - began
        told = "; ".join(f"{finding.what}: {finding.found}" for finding in findings)
        print(f"preflight, {seconds:.1f} s: {told}", flush=True)
        for finding in findings:
            if finding.advice and not finding.wrong:
                print(f"WARNING: {finding.what}: {finding.found}: {finding.advice}", file=sys.stderr, flush=True)
    wrong = [f"{finding.what}: {finding.wrong}" for finding in findings if finding.wrong]
    if wrong:
        raise UnfitRank(f"wrong numbers before the first step: {'; '.join(wrong)}: take them out of the job")


# --- measures --------------------------------------------------------------------------------------------------------


def known_product(side: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A product whose every partial sum is a whole number up to 256, so exact in bf16 however a kernel splits it."""
    places = torch.arange(side, device=device)
    counted = places % (side // 64) == 0
    row, column = torch.where(counted, places % 3 + 1, 0), torch.where(counted, 1, 7)
    left, right = (values.to(dtype).repeat(side, 1) for values in (row, column))
    return lambda: left @ right.T, int((row * column).sum())


def _product(side: int, dtype: torch.dtype, mesh: Mesh, device: Device) -> _Measured:
    product, expected = known_product(side, dtype, device.torch_device)
    seconds, right = _fastest(lambda: bool((product() == expected).all()), mesh, device)
    return _Measured(2 * side**3 / seconds / 1e12, right)


def _copy(mib: int, mesh: Mesh, device: Device) -> _Measured:
    source = torch.ones(mib * _MIB, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    seconds, _ = _fastest(lambda: target.copy_(source) is target, mesh, device)
    return _Measured(2 * mib * _MIB / seconds / 1e9, bool((target == 1).all()))


def _sum(axis: Axis, mib: int, mesh: Mesh, device: Device) -> _Measured:
    elements = mib * _MIB // 4
    summands = torch.full((elements,), float(axis.rank + 1), device=device.torch_device)
    total = axis.size * (axis.size + 1) / 2
    work = torch.empty_like(summands)

    def check() -> bool:
        work.copy_(summands)
        dist.all_reduce(work, group=axis.group)
        return bool((work == total).all())

    seconds, right = _fastest(check, mesh, device)
    return _Measured(elements * 4 / seconds / 1e9, right)


def _write(folder: Path, mesh: Mesh, device: Device) -> _Measured:
    """The first rank of each host writes, all at the same time, as checkpoints are written."""
    meet(mesh.world, device.torch_device)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return _Measured(None)
    block, path = os.urandom(8 * _MIB), folder / f".preflight_{mesh.world.rank}"
    began = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            file.write(block)
            os.fsync(file.fileno())
        return _Measured(len(block) / (time.perf_counter() - began) / 1e9)
    except OSError:
        return _Measured(0.0, right=False)
    finally:
        path.unlink(missing_ok=True)


def _fastest(check: Callable[[], bool], mesh: Mesh, device: Device) -> tuple[float, bool]:
    """(seconds of the fastest round, whether every round was right); one round before them warms up."""
    right, seconds = check(), []
    for _ in range(ROUNDS):
        meet(mesh.world, device.torch_device)
        start = device.clock_s()
        right &= check()
        seconds.append(device.clock_s() - start)
    return min(seconds), right


# --- comparing -------------------------------------------------------------------------------------------------------


def _speeds(what: str, unit: str, own: _Measured, mesh: Mesh) -> Finding:
    ranks = everyone((socket.gethostname(), own), mesh.control)
    return compare(what, unit, [(host, measured.speed, measured.right) for host, measured in ranks])


def compare(what: str, unit: str, ranks: Sequence[tuple[str, float | None, bool]]) -> Finding:
    """ranks: (host, speed or None, whether its numbers were right) in rank order."""
    took_part = {rank: speed for rank, (_, speed, _) in enumerate(ranks) if speed is not None}
    wrong = [rank for rank, (_, _, right) in enumerate(ranks) if not right]
    speeds = list(took_part.values())
    median = statistics.median(speeds)
    found = f"{median:.3g} {unit}, {min(speeds):.3g} to {max(speeds):.3g} on {len(speeds)} rank(s)"
    if wrong:
        return Finding(what, found, wrong=named(wrong, [host for host, _, _ in ranks]))
    slow = [rank for rank, speed in took_part.items() if speed < SLOW * median]
    if not slow:
        return Finding(what, found)
    names = named(slow, [host for host, _, _ in ranks])
    advice = f"{names} below {SLOW:.0%} of the median: a step waits for its slowest rank"
    return Finding(what, found, advice=advice)


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """rank 3 on node-b, rank 4 on node-b; and 2 more."""
    shown = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:_SHOWN])
    return shown + (f"; and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _clocks(mesh: Mesh) -> Finding:
    """Read as soon as all have met, so apart by no more than a message takes."""
    meet(mesh.control, torch.device("cpu"))
    return clocks([*everyone((socket.gethostname(), time.time()), mesh.control)])


def clocks(ranks: Sequence[tuple[str, float]]) -> Finding:
    """ranks: (host, its clock) in rank order."""
    median = statistics.median(clock for _, clock in ranks)
    off = [clock - median for _, clock in ranks]
    found = f"{max(off) - min(off):.3f} s apart"
    odd = [rank for rank, seconds in enumerate(off) if abs(seconds) > CLOCKS_S]
    if not odd:
        return Finding("clocks", found)
    return Finding("clocks", found, advice=f"{named(odd, [host for host, _ in ranks])}: set them by NTP")


def _limits(mesh: Mesh) -> list[Finding]:
    """What a host gives its processes, and where it is too little."""
    try:
        shared = shutil.disk_usage("/dev/shm").free / 1e9
    except OSError:
        shared = 0.0
    own = (socket.gethostname(), shared, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    ranks = everyone(own, mesh.control)
    hosts = [host for host, _, _ in ranks]
    return [
        _least(
            "free shared memory", [gb for _, gb, _ in ranks], SHARED_MEMORY_GB, "GB", hosts, "docker --shm-size=16g"
        ),
        _least("open files", [files for _, _, files in ranks], OPEN_FILES, "", hosts, "ulimit -n 65536"),
    ]


def _least(what: str, values: list[float], least: float, unit: str, hosts: list[str], cure: str) -> Finding:
    found = f"at least {min(values):.6g} {unit}".strip()
    few = [rank for rank, value in enumerate(values) if value < least]
    return Finding(what, found, advice=f"{named(few, hosts)} below {least:g} {unit}: {cure}" if few else "")
