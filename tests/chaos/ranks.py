"""Ranks of a small job, forked from a server that has imported the engine, and what torchrun does about them.

A start costs a second instead of the ten that torchrun and the imports take, so many disturbances can be tried; what
torchrun has a part in (its own signals, its restarts) is in test_jobs.py. A rank runs `engine.train` as it is.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

PATIENCE_S = 900.0
"""A start that is not over by then has its Python stacks in its log, and is killed."""
GRACE_S = 120.0
"""From the SIGTERM that follows the first failure to the SIGKILL, which no case needs; that of a rank that is stopped
comes at once.
"""
_STACKS_S = 10.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONWARNINGS": "ignore",
}
TINY = (
    "model.embed_dim=16",
    "model.vision={image_size: 24, patch_size: 12, depth: 2, width: 24, head_width: 12, mlp_hidden: 48, norm: rms, "
    "post_norm: true}",
    "model.text={context_length: 12, vocab_size: 49408, width: 16, depth: 1, heads: 2}",
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.keep_activations=1",
    "train.logit_scale=null",
    "optim.warmup_steps=2",
    "log.every_steps=1",
    "log.tensorboard=false",
    "checkpoint.keep_last=2",
)
"""Settings of a job whose steps take some 20 ms."""


@dataclass
class Start:
    """One start of the job: its ranks and what they have printed."""

    ranks: list[BaseProcess]
    log: Path
    port: socket.socket
    """Keeps others from the port of its store."""
    began_s: float = field(default_factory=time.monotonic)
    first_end_s: float = 0.0
    """When the first rank ended."""

    @property
    def text(self) -> str:
        """Output of all ranks."""
        return self.log.read_text(errors="replace")

    def own_errors(self) -> list[str]:
        """Lines in which the ranks say why they end."""
        said = ("error: ", "stopped by ")
        return [line for line in self.text.splitlines() if line.startswith(said)]

    def end(self, patience_s: float = PATIENCE_S) -> list[int]:
        """Wait for the ranks as torchrun does, which ends the others when one fails; the exit statuses."""
        deadline, told = time.monotonic() + patience_s, False
        running = {rank.sentinel: rank for rank in self.ranks}
        while running:
            left = max(0.0, deadline - time.monotonic()) if deadline < float("inf") else None
            for sentinel in wait(list(running), timeout=left):
                rank = running.pop(sentinel)  # type: ignore[arg-type]
                rank.join()
                self.first_end_s = self.first_end_s or time.monotonic()
                if rank.exitcode and not told:
                    told, deadline = True, min(deadline, time.monotonic() + GRACE_S)
                    for other in running.values():
                        _signal(other, signal.SIGKILL if _is_stopped(other) else signal.SIGTERM)
            if running and time.monotonic() >= deadline:
                _dump_stacks(running.values(), self.log)
                for other in running.values():
                    other.kill()
                deadline = float("inf")  # nothing outlives that
        self.port.close()
        return [rank.exitcode or 0 for rank in self.ranks]


def launch(
    config: str,
    overrides: Sequence[str],
    size: int,
    log: Path,
    *,
    prepare: Callable[..., None] | None = None,
    prepared_with: tuple = (),
    overrides_of: dict[int, Sequence[str]] | None = None,
) -> Start:
    """Start the ranks. prepare(rank, *prepared_with): run in each of them before the job (module level)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload", "tests.chaos.preload"])
    port = hold_port()
    number = port.getsockname()[1]
    log.write_bytes(b"")
    ranks: list[BaseProcess] = [
        context.Process(
            target=_run_rank,
            args=(
                rank,
                size,
                number,
                str(log),
                config,
                [*overrides, *(overrides_of or {}).get(rank, ())],
            ),
            kwargs={"prepare": prepare, "prepared_with": prepared_with},
        )
        for rank in range(size)
    ]
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # OpenMP reads them when the server imports torch
    try:
        for rank in ranks:
            rank.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return Start(ranks, log, port)


def _run_rank(
    rank: int,
    size: int,
    port: int,
    log: str,
    config: str,
    overrides: list[str],
    prepare: Callable[..., None] | None,
    prepared_with: tuple,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(ENVIRONMENT)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from engine import train
    from engine.resilience.exit import leave

    if prepare is not None:
        prepare(rank, *prepared_with)
    leave(train.main([config, *overrides]))


def _dump_stacks(ranks: Iterable[BaseProcess], log: Path) -> None:
    """Have ranks that do not end write where they are."""
    with log.open("a") as file:
        file.write(f"not over in time: {', '.join(rank.name for rank in ranks)}\n")
    for rank in ranks:
        _signal(rank, signal.SIGUSR2)
    wait([rank.sentinel for rank in ranks], _STACKS_S)


def _is_stopped(rank: BaseProcess) -> bool:
    return _state(rank.pid) == "T"


def _signal(rank: BaseProcess, number: int) -> None:
    if rank.pid is not None and rank.is_alive():
        send(rank.pid, number)


def send(pid: int, number: int) -> None:
    """A signal to a process, which may have ended just now."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def children_of(pid: int | str) -> list[int]:
    """Processes that a process has started; its threads come and go meanwhile."""
    found: list[int] = []
    for thread in glob(f"/proc/{pid}/task/*/children"):
        with suppress(OSError):
            found += map(int, Path(thread).read_text().split())
    return found


def hold_port() -> socket.socket:
    """A socket with a free port, which nobody is given while it is open; whoever names it (a store, with the same
    SO_REUSEADDR) may listen there, as this socket does not.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def wait_until_stopped(pids: Sequence[int]) -> None:
    """Until SIGSTOP has reached them all; those that are gone do not count."""
    while any(_state(pid) not in "TtXZ" for pid in pids):
        time.sleep(0.01)


def _state(pid: int | None) -> str:
    """The kernel's letter; X of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"
