"""One measurement in processes of its own: torchrun on this host, its outcome or the reason why there is none."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 30.0
_RANK_PREFIX = re.compile(r"^\[rank\d+\]:\s*")
_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b.*")
_SHOWN_CHARACTERS = 300


def launch(arguments: Sequence[str], ranks: int, *, threads: int | None, timeout_s: float) -> str | None:
    """Run `tools.benchmark` with these arguments on `ranks` ranks; None, or why it failed.

    threads: CPU threads of a rank; None: OMP_NUM_THREADS if it is set, else the cores shared out.
    """
    # --local-addr: all ranks are on this host, whose name need not resolve.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command.append(f"--nproc-per-node={ranks}")
    process = subprocess.Popen(
        [*command, "-m", "tools.benchmark", *arguments],
        env=_environment(ranks, threads),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"not done after {timeout_s:g} s"
    except BaseException:
        _end(process)
        raise
    return None if process.returncode == 0 else failure_reason(errors, process.returncode)


def failure_reason(errors: str, status: int) -> str:
    """The line that says most in what torchrun and the ranks wrote."""
    lines = [_RANK_PREFIX.sub("", line).strip() for line in errors.splitlines()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if _EXCEPTION.match(line) and "ChildFailedError" not in line]
    if own or raised:
        return (own or raised)[0][:_SHOWN_CHARACTERS]
    if "SIGKILL" in errors or "exitcode: -9" in errors or "exitcode  : -9" in errors:
        return "a rank was killed (SIGKILL): most likely not enough memory"
    return f"exit status {status} without a message"


def _environment(ranks: int, threads: int | None) -> dict[str, str]:
    given = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads and ranks leave their core to the others
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    # Started where the caller is: paths of its overrides (data.shards) are relative to that.
    own = {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))}
    return given | os.environ | own | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def _end(process: subprocess.Popen[str]) -> None:
    """torchrun ends its ranks when it is told to; what is left after that is killed with it."""
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
