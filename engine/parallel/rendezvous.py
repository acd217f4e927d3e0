"""How the ranks of a start find each other: a key-value store that is theirs alone.

torchrun keeps one store for all its restarts, and what dead ranks have left in it, their addresses above all, would be
taken for that of living ones (pytorch issue 135712). Its count of restarts is no help: each host counts its own. So the
ranks first agree on a name that no earlier start has used: rank 0 draws it and hands it to whoever asks with a name of
his own; what is left of earlier starts is never asked for again. This is also where a rank that does not come is named.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.02


class NotEveryoneCame(Exception):
    """Ranks are missing at the start; the message names them."""


def own_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store of this start, rank, ranks). Collective over all ranks of the job.

    Raises NotEveryoneCame after `timeout`, or at once where the environment does not say who meets where.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise NotEveryoneCame(
            f"RANK is set, but not all of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT ({error}): start with "
            "torchrun, or without RANK for one process"
        ) from None
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        # multi_tenant: a port that this process listens on already may be shared
        shared = dist.TCPStore(
            host, port, size, is_master=not hosted and rank == 0, timeout=timeout, wait_for_workers=False,
            multi_tenant=not hosted,
        )  # fmt: skip
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise NotEveryoneCame(f"rank {rank} found nobody at {host}:{port}: {_first_line(error)}") from None
    return dist.PrefixStore(_agree_on_name(shared, rank, size, timeout), shared), rank, size


def _agree_on_name(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    if rank == 0:
        return _hand_out(store, size, time.monotonic() + timeout.total_seconds())
    asked = uuid.uuid4().hex
    store.set(f"asks/{rank}", asked)
    try:
        store.wait([f"name/{asked}"], timeout)
    except dist.DistStoreError:
        raise NotEveryoneCame(f"rank 0 did not come within {timeout.total_seconds():.0f} s") from None
    name = store.get(f"name/{asked}").decode()
    store.set(f"{name}/came/{rank}", "")
    return name


def _hand_out(store: dist.Store, size: int, deadline_s: float) -> str:
    name, answered, missing = uuid.uuid4().hex, set[bytes](), list(range(1, size))
    while missing:
        for rank in missing:
            if store.check([f"asks/{rank}"]):
                asked = store.get(f"asks/{rank}")
                if asked not in answered:
                    answered.add(asked)
                    store.set(f"name/{asked.decode()}", name)
        missing = [rank for rank in missing if not store.check([f"{name}/came/{rank}"])]
        if missing and time.monotonic() > deadline_s:
            shown = ", ".join(str(rank) for rank in missing[:20]) + (", …" if len(missing) > 20 else "")
            raise NotEveryoneCame(
                f"ranks {shown} of {size} did not come in time (parallel.start_timeout_minutes): are their hosts up, "
                "and is every host started with the same number of ranks?"
            )
        time.sleep(_POLL_S if missing else 0)
    return name


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
