"""Who tells what: one line from one rank, however many ranks meet an error or its consequences.

A mistake that all ranks find is told by the first of them. A rank that has only lost another one says so in one line,
once in the job, and leaves a little later than the rank at fault, so that torchrun names that one as the first failure.
Only what nobody has foreseen gets a traceback, from the rank that met it.
"""

import hashlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

from engine.parallel.agree import PeerFailed

_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting \d+ms|NCCL (error|timeout)|ncclRemoteError"
    r"|Application timeout|wait timeout after|Connection was likely closed|Failed to recv|failed to connect"
)
_READER = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")
"""torch's signal handler says so wherever the training thread happens to be."""
_AT_FAULT = "told by the rank at fault"
_LATER_S = 3.0
"""How much later than the rank at fault the others end."""


def note(error: Exception, store: dist.Store) -> None:
    """Settle whether this rank tells `error`. store: that of this start."""
    if isinstance(error, PeerFailed):
        told = True
    else:
        lost = lost_peer(error)
        text = "lost" if lost else f"{type(error).__name__} {error}"
        try:
            if lost:
                error.at_fault_has_told = lambda: store.check([_AT_FAULT])  # type: ignore[attr-defined]
            else:
                store.set(_AT_FAULT, "")
            told = store.add(f"told/{hashlib.sha256(text.encode()).hexdigest()}", 1) > 1
        except RuntimeError:  # the store went with its host: better told twice than never
            told = False
    error.told_elsewhere = told  # type: ignore[attr-defined]


def lost_peer(error: Exception) -> bool:
    """Whether the error is but the consequence of another rank's end."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def tell(error: Exception) -> int:
    """Print what this rank has to say about the error that ends it; returns the exit status."""
    if lost_peer(error):
        time.sleep(_LATER_S)
        if _asked(getattr(error, "at_fault_has_told", None)):
            return 1
    if getattr(error, "told_elsewhere", False):
        return 1
    rank = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    if lost_peer(error):
        what = " ".join(str(error).splitlines()[0].split("] ")[-1].split(". This is")[0].split())
        _say(f"error: {rank} lost another rank ({what}): torchrun's summary names the rank that ended first")
    elif isinstance(error, torch.OutOfMemoryError):
        _say(
            f"error: {rank} is out of memory ({' '.join(str(error).split())}): lower train.micro_batch_size or "
            "train.keep_activations, set train.recompute, or cut the model further (tools.plan)"
        )
    elif isinstance(error, RuntimeError) and _READER.search(str(error)):
        _say(
            f"error: a reader of {rank} died ({' '.join(str(error).split())}): out of memory? lower "
            "data.prefetch_batches or data.workers"
        )
    elif isinstance(error, OSError):
        _say(f"error: {rank}: {error}")
    else:
        _say("".join(traceback.format_exception(error)) + f"error: {rank} failed: {type(error).__name__}: {error}")
    return 1


def tell_line(error: Exception) -> int:
    """The same for a mistake whose message says everything."""
    if not getattr(error, "told_elsewhere", False):
        _say(f"error: {error}")
    return 1


def _asked(question: Callable[[], bool] | None) -> bool:
    """An answer from the store, which may be gone with its host."""
    try:
        return question is not None and question()
    except RuntimeError:
        return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
