"""How a rank ends. Imports neither torch nor megatron-core: a mistake in a config ends here, too, and at once."""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import time

STOPPED = 75
"""Exit status of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)."""


_PATIENCE_S, _TURN_S = 30.0, 0.5
"""How long the other ranks of a start leave the word to the first one, which torchrun ends them for, and then to each
rank of their host before them.
"""


def refuse(error: Exception) -> int:
    """Tell a mistake that was found before any process group exists; the exit status.

    Every rank reads the same config and looks at the same paths, so every rank is here: the first one tells it and
    ends, and torchrun ends the others, which wait for that in silence. Where the mistake is one host's alone (a folder
    that is not mounted there) or one rank's, nobody ends them: the first of them tells it then.
    """
    rank, host_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank != 0:
        time.sleep(_PATIENCE_S + _TURN_S * host_rank)
    where = "" if rank == 0 else f"rank {rank} on {socket.gethostname()}: "
    print(f"error: {where}{error}", file=sys.stderr, flush=True)
    return 1


def crashes_leave_stacks() -> None:
    """Have a crash in foreign code (SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL) leave the Python stacks of all threads on
    standard error, which the rank's log holds. Where there is no such stream (a notebook's own), nothing changes.
    """
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            faulthandler.enable(all_threads=True)


def leave(status: int) -> None:
    """End this process with `status`, everything flushed, without running the destructors of C++ libraries.

    After an error other ranks may wait in a collective for this one: it leaves without their consent. After success the
    work is done and the process group is closed; but gloo's threads and torch's static objects race in the
    interpreter's own shutdown ("terminate called without an active exception" in 2 of 60 two-rank runs on torch 2.13),
    and torchrun would call a finished job failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
