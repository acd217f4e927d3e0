"""Which machine this is, as far as files are concerned: names of hosts come twice."""

import os
import socket
from contextlib import suppress
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_of(folder: Path) -> str:
    """Equal for two processes under one kernel that see one file system at `folder`, and for no others: locks there
    hold between them, and files of one are those of the other.

    A host's name may be another's as well (localhost; containers of one recipe on two nodes), and containers of one
    node may each have mounted the place for themselves. A kernel has a number of its own from when it boots; where it
    tells none, the name has to do. A folder that is not there: the machine alone.
    """
    parts = [socket.gethostname()]
    if boot := boot_of_machine():
        parts.append(boot)
    with suppress(OSError):
        parts.append(f"device {os.stat(folder).st_dev}")
    return " ".join(parts)


def boot_of_machine() -> str | None:
    """What the kernel calls the time since it booted; None where it tells nothing."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None
