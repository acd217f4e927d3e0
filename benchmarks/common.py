"""What every benchmark needs: the machine's description, memory of a process, medians, results as JSON."""

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

# Waiting threads and ranks leave their core to the others; read when torch is imported, so by child processes.
CHILD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def machine() -> dict[str, Any]:
    """What the numbers depend on, and the load that other programs put on it when this was called."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_1min": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "none yet",
    }


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A measured quantity."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median and range."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), runs=len(values))


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def reset_peak() -> int:
    """Give freed memory back, start VmHWM anew and return the resident bytes from which it starts."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def child_environment(threads: int, extra_path: str = "") -> dict[str, str]:
    """Variables of a measuring process. extra_path: a folder of packages that only it may import."""
    path = os.pathsep.join(filter(None, (str(RESULTS.parent.parent), extra_path)))
    return os.environ | CHILD_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def python_module(module: str, *arguments: str, threads: int, extra_path: str = "") -> subprocess.Popen[str]:
    """Start `python -m module arguments` with pipes, in the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=RESULTS.parent.parent,
        env=child_environment(threads, extra_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def write_json(result: dict[str, Any], path: Path) -> None:
    """Raw results, readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
