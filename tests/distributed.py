"""Starts ranks for every multi-rank test.

`run_distributed(fn, world_size, **kwargs)` runs the module-level function `fn(**kwargs)` on `world_size`
processes inside an initialised gloo group and returns what each rank returned, in rank order. They are forked
from a server that has imported the engine, so a launch costs no import.

* Ranks meet through a file, so two test runs never race for a port.
* The first rank that fails ends the others; the error shows the stderr of every rank.
* A hang ends `timeout_s` after the ranks met: every rank writes its Python stack and exits; what is left is killed. A
  crash leaves its stack, too.
* A coalesced collective, which corrupts memory on gloo (engine.parallel.replicas), is refused: nothing else would tell.
* Results travel as tensor files that are read with `weights_only`, so a rank may return tensors, numbers,
  strings, and lists, tuples and dicts of them.
"""

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One thread a rank, and a waiting rank leaves its core to the others: ranks outnumber cores in tests. Gloo is
# told the loopback device, because a host name need not resolve on a test machine.
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# Time for ranks to start and meet, beside the limit of what they then do, and for the others to report after a failure.
START_GRACE_S = 100.0
LAST_WORDS_S = 1.0
# Limit of a launch of many cases (a minute or two on idle cores), on a machine that has other work, too.
MANY_CASES_S = 1200.0
SHOWN_STDERR_CHARACTERS = 6000


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds the stderr of every rank."""


def world() -> dist.ProcessGroup:
    """The group of all ranks, inside one."""
    group = dist.group.WORLD
    assert group is not None
    return group


def run_distributed(
    fn: Callable[..., Any], world_size: int, *, timeout_s: float = 180.0, forked: bool = False, **kwargs: Any
) -> list[Any]:
    """Run `fn(**kwargs)` on `world_size` gloo ranks and return their results in rank order.

    `fn` must be importable (module level); kwargs must be picklable. Raises RankFailure when a rank raises,
    dies or is not done `timeout_s` after all ranks met. With `forked` the ranks are forked from this process and not
    from the server; it must not have computed anything yet, because threads do not survive a fork.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        scratch = Path(folder)
        ranks = _start(fn, world_size, scratch, timeout_s, kwargs, method="fork" if forked else "forkserver")
        try:
            problem = _wait_for(ranks, timeout_s + 2 * START_GRACE_S)
        finally:
            _kill(ranks)
        if problem:
            raise RankFailure(f"{fn.__module__}.{fn.__qualname__}: {problem}\n{_stderr_of(scratch, world_size)}")
        return [torch.load(_result_path(scratch, rank), weights_only=True) for rank in range(world_size)]


def _start(
    fn: Callable[..., Any], world_size: int, scratch: Path, timeout_s: float, kwargs: dict[str, Any], *, method: str
) -> list[BaseProcess]:
    context: Any = mp.get_context(method)
    if method == "forkserver":  # torch and megatron-core are imported once, not once a rank
        context.set_forkserver_preload(["tests.preload"])
    with _environment(RANK_ENVIRONMENT):
        ranks: list[BaseProcess] = [
            context.Process(
                target=_rank_main, args=(rank, world_size, str(scratch), timeout_s, fn, kwargs), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
    return ranks


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the children only: OpenMP reads them when torch is imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait_for(ranks: list[BaseProcess], timeout_s: float) -> str:
    """Wait until all ranks ended well; return the problem in words, or an empty string."""
    deadline = time.monotonic() + timeout_s
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return f"ranks {sorted(running.values())} were not done after {timeout_s:.0f} s and were killed"
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            ranks[rank].join()
            if ranks[rank].exitcode != 0:
                for other in running.values():
                    ranks[other].join(LAST_WORDS_S)
                return f"rank {rank} of {len(ranks)} failed first (exit code {ranks[rank].exitcode})"
    return ""


def _kill(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            process.kill()
    for process in ranks:
        process.join()
        process.close()


def _rank_main(
    rank: int, world_size: int, scratch: str, timeout_s: float, fn: Callable[..., Any], kwargs: dict[str, Any]
) -> None:
    _send_stderr_to(_stderr_path(Path(scratch), rank))
    faulthandler.enable()  # a rank that crashes in foreign code leaves its stacks
    faulthandler.dump_traceback_later(START_GRACE_S, exit=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    _refuse_coalesced_collectives()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{scratch}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=START_GRACE_S + timeout_s),  # the stack dump comes first: it says more
        )
        faulthandler.dump_traceback_later(timeout_s, exit=True)
        torch.save(fn(**kwargs), _result_path(Path(scratch), rank))
        # No rank tears down while another still talks to it.
        dist.barrier(group=dist.group.WORLD)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # No clean-up: it could wait for ranks that wait for this one. The parent kills them.
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _refuse_coalesced_collectives() -> None:
    """Have those whose names are too long for gloo raise. Its reduce-scatters of several tensors are all-reduces."""

    def refused(*_: Any) -> None:
        raise AssertionError("a coalesced collective on gloo corrupts memory: see engine/parallel/replicas.py")

    for name in ("allreduce", "allgather", "allgather_into_tensor", "all_gather_single"):
        if hasattr(dist.ProcessGroup, f"{name}_coalesced"):  # torch 2.13 has a new name for one of them
            setattr(dist.ProcessGroup, f"{name}_coalesced", refused)


def _send_stderr_to(path: Path) -> None:
    with path.open("wb") as stream:
        os.dup2(stream.fileno(), 2)


def _stderr_path(scratch: Path, rank: int) -> Path:
    return scratch / f"stderr-{rank}.txt"


def _result_path(scratch: Path, rank: int) -> Path:
    return scratch / f"result-{rank}.pt"


def _stderr_of(scratch: Path, world_size: int) -> str:
    parts = []
    for rank in range(world_size):
        path = _stderr_path(scratch, rank)
        text = path.read_text(errors="replace") if path.exists() else "(did not start)"
        parts.append(f"--- rank {rank} stderr ---\n{text[-SHOWN_STDERR_CHARACTERS:]}")
    return "\n".join(parts)
