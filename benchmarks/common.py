"""What every benchmark needs: the machine's description, memory of a process, medians, results as JSON and charts."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.benchmark.machine import machine as machine
from tools.benchmark.result import Spread as Spread

if TYPE_CHECKING:  # a side whose memory is measured loads no matplotlib
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Waiting threads and ranks leave their core to the others; read when torch is imported, so by child processes.
CHILD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


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


def child_environment(threads: int, extra_path: str = "", root: Path = ROOT) -> dict[str, str]:
    """Variables of a measuring process. extra_path: a folder of packages for it alone; root: of its build."""
    path = os.pathsep.join(filter(None, (str(root), extra_path)))
    return os.environ | CHILD_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def python_module(
    module: str, *arguments: str, threads: int, extra_path: str = "", root: Path = ROOT
) -> subprocess.Popen[str]:
    """Start `python -m module arguments` with pipes, in the repository's root, or in that of another build."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=root,
        env=child_environment(threads, extra_path, root),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def run_ranks(ranks: int, module: str, *arguments: str, threads: int) -> str:
    """Run `python -m module arguments` on so many ranks of this host, in the repository's root; what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += [f"--nproc-per-node={ranks}", "-m", module, *arguments]
    environment = child_environment(threads)
    return subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def write_json(result: dict[str, Any], path: Path) -> None:
    """Raw results, readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def save_chart(figure: "Figure", path: Path) -> None:
    """A chart without frames above and beside its axes."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")
