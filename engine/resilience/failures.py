"""Who tells what: one line from one rank, however many ranks meet an error or its consequences.

A mistake that all ranks find is told by the first of them. A rank that has only lost another one says so in one line,
once in the job, and leaves a little later than the rank at fault, so that torchrun names that one as the first failure.
Only what nobody has foreseen gets a traceback, from the rank that met it.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.agree import PeerFailed
from engine.waits import answer_of

_POLL_S = 0.02
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting \d+ms|NCCL (error|timeout)|ncclRemoteError"
    r"|Application timeout|wait timeout after|Connection was likely closed|Failed to recv|failed to connect"
)
_TOO_LATE = re.compile(r"Timed out waiting|[Tt]imeout")
_READER = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")
"""torch's signal handler says so wherever the training thread happens to be."""
_AT_FAULT, _NOTED = "told by the rank at fault", "noted"
_KEPT = 12
"""Collectives of a group that are shown."""
_LATER_S = 3.0
"""How much later than the rank at fault the others end, and how long the rank that holds the store stays for them."""


def note(error: Exception, store: dist.Store) -> None:
    """Settle whether this rank tells `error`. store: that of this start."""
    lost = lost_peer(error)
    text = "lost" if lost else f"{type(error).__name__} {error}"
    at_fault_has_told: Callable[[], bool] = lambda: store.check([_AT_FAULT])  # noqa: E731

    def noted() -> bool:
        if isinstance(error, PeerFailed) or (lost and at_fault_has_told()):
            told = True
        else:
            if not lost:
                store.set(_AT_FAULT, "")
            told = store.add(f"told/{hashlib.sha256(text.encode()).hexdigest()}", 1) > 1
        store.add(_NOTED, 1)
        return told

    # where the store does not answer: better told twice than never
    error.told_elsewhere = answer_of(noted, isinstance(error, PeerFailed))  # type: ignore[attr-defined]
    if lost:
        error.at_fault_has_told = at_fault_has_told  # type: ignore[attr-defined]
    elif _holds_the_store():
        everyone = int(os.environ["WORLD_SIZE"])
        error.all_have_noted = lambda: store.add(_NOTED, 0) >= everyone  # type: ignore[attr-defined]


def _holds_the_store() -> bool:
    """Whether the store ends with this rank: torchrun, which holds it otherwise, has not started it."""
    return os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def lost_peer(error: Exception) -> bool:
    """Whether the error is but the consequence of another rank's end."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def reason(error: Exception) -> str:
    """Why a job ended, for its status: gloo's text about a lost rank is a paragraph."""
    if not lost_peer(error):
        return str(error)
    what = " ".join(str(error).splitlines()[0].split("] ")[-1].split(". This is")[0].split())
    return f"lost another rank ({what})"


def tell(error: Exception, run_dir: Path | None = None) -> int:
    """Print what this rank has to say about the error that ends it; returns the exit status.

    A rank that has lost another leaves its last collectives in run_dir/hang: the lost one may have died in them. The
    one that tells of it names those that have fallen silent, since nobody else does where a whole host is gone.
    """
    silent = ""
    if lost_peer(error):
        if run_dir is not None:
            leave_collectives(run_dir / "hang")
        silence: Callable[[float], str] | None = getattr(error, "silence", None)
        if silence is not None and not getattr(error, "told_elsewhere", False):
            silent = silence(_LATER_S)
        else:
            time.sleep(_LATER_S)
        if _asked(getattr(error, "at_fault_has_told", None)):
            return 1
    if not getattr(error, "told_elsewhere", False):
        _say(_in_words(error, silent))
    _stay_for_the_others(error)
    return 1


def leave_collectives(folder: Path) -> None:
    """Write what torch's flight recorder has kept of each gloo group's last collectives: a line each, the latest at the
    end, in a file a rank. (NCCL's recorder is another one, which torch dumps at its time-out.)
    """
    record = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)  # not in every torch of the range
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing that a rank's last word waits for
        lines = _in_groups(json.loads(record())["entries"]) if record is not None else []
        folder.mkdir(exist_ok=True)  # without parents: a run folder that was taken away stays away
        path = folder / f"collectives_{int(os.environ.get('RANK', '0')):05d}.txt"
        path.write_text("\n".join(lines), encoding="utf-8")


def _in_groups(entries: list[dict[str, Any]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for entry in entries:
        name, axis = entry["process_group"]
        sizes = f"{entry['input_sizes']} -> {entry['output_sizes']} {', '.join(entry['input_dtypes'])}"
        state = "ended" if entry["retired"] else entry["state"]
        line = f"{axis} {name[:8]}: {entry['collective_seq_id']} {entry['profiling_name']} {sizes}, {state}"
        groups.setdefault(name, []).append(line)
    return [line for lines in groups.values() for line in lines[-_KEPT:]]


def _in_words(error: Exception, silent: str) -> str:
    """silent: ranks that have stopped to give signs of life, in words; known where one was lost."""
    rank = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    if lost_peer(error):
        if not silent and _TOO_LATE.search(str(error)):
            return (
                f"error: {rank} {reason(error)}: none answered within parallel.timeout_minutes, or the whole job was "
                "stopped for longer; a new start goes on from the newest checkpoint"
            )
        who = silent or "torchrun's summary, on the host of the rank that ended first, names it"
        return f"error: {rank} {reason(error)}: {who}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"error: {rank} is out of memory ({' '.join(str(error).split())}): lower train.micro_batch_size, "
            "train.keep_activations or train.keep_outputs, set train.recompute, or cut the model further (tools.plan)"
        )
    if isinstance(error, RuntimeError) and _READER.search(str(error)):
        return (
            f"error: a reader of {rank} died ({' '.join(str(error).split())}): out of memory? lower "
            "data.prefetch_batches or data.workers"
        )
    if isinstance(error, OSError):
        return f"error: {rank}: {error}"
    return "".join(traceback.format_exception(error)) + f"error: {rank} failed: {type(error).__name__}: {error}"


def tell_line(error: Exception) -> int:
    """The same for a mistake whose message says everything."""
    if not getattr(error, "told_elsewhere", False):
        _say(f"error: {error}")
    _stay_for_the_others(error)
    return 1


def _stay_for_the_others(error: Exception) -> None:
    """The rank that holds the store stays until the others have asked there whether they are to tell the error too."""
    all_have_noted, until_s = getattr(error, "all_have_noted", None), time.monotonic() + _LATER_S
    while all_have_noted is not None and not _asked(all_have_noted) and time.monotonic() < until_s:
        time.sleep(_POLL_S)


def _asked(question: Callable[[], bool] | None) -> bool:
    """An answer from the store, which may be gone with its host, or stand still with it."""
    return question is not None and answer_of(question, False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
