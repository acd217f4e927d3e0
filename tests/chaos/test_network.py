"""Two hosts, as network namespaces joined by a cable that is pulled: for a while, and for good.

Needs the right to make network namespaces (root); left out without it.
"""

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.matrix import curve
from tests.chaos.ranks import PATIENCE_S, TINY, Start, launch
from tests.data.shard_factory import make_shards

CUT_S = 10.0
STEPS, CUT_AFTER = 8, 3
_CLONE_NEWNET = 0x40000000

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Cable:
    """Two namespaces and their ends of a veth pair."""

    names: tuple[str, str]

    def pull(self) -> None:
        """Nothing arrives any more; nobody is told."""
        assert _ip("-n", self.names[1], "link", "set", "end1", "down")

    def plug(self) -> None:
        """As before."""
        assert _ip("-n", self.names[1], "link", "set", "end1", "up")


@pytest.fixture
def cable() -> Iterator[Cable]:
    names = (f"eva{os.getpid()}a", f"eva{os.getpid()}b")
    if not all(_ip("netns", "add", name) for name in names):
        pytest.skip("no right to make network namespaces")
    try:
        ends = ["netns", names[0], "type", "veth", "peer", "name", "end1", "netns", names[1]]
        assert _ip("link", "add", "end0", *ends)
        for side, name in enumerate(names):
            assert _ip("-n", name, "addr", "add", f"10.77.0.{side + 1}/24", "dev", f"end{side}")
            assert _ip("-n", name, "link", "set", f"end{side}", "up") and _ip("-n", name, "link", "set", "lo", "up")
        yield Cable(names)
    finally:
        for name in names:
            _ip("netns", "del", name)


def _move(names: tuple[str, str], may_go_on: str, rank: int) -> None:
    """This rank lives on its host from here on, and stays before a step until it may go on."""
    with open(f"/var/run/netns/{names[rank]}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), _CLONE_NEWNET) == 0
    os.environ.update(MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME=f"end{rank}")
    from engine.resilience.watch import Pulse

    begin = Pulse.at

    def at(pulse: Pulse, part: str, unit: object = None) -> None:
        begin(pulse, part, unit)
        while part == "encode" and pulse.step + 1 == CUT_AFTER and not os.path.exists(may_go_on):
            time.sleep(0.01)

    Pulse.at = at  # type: ignore[method-assign, assignment]


def _start(cable: Cable, folder: Path, *more: str) -> Start:
    shards = make_shards(folder, [20, 28])
    settings = [*TINY, f"data.shards=[{','.join(shards)}]", f"train.steps={STEPS}", f"run_dir={folder / 'run'}"]
    settings += ["data.workers=0", "checkpoint.every_steps=2", *more]
    (folder / "go_on").unlink(missing_ok=True)
    prepare = partial(_move, cable.names, str(folder / "go_on"))
    start = launch("examples/quickstart/train.yaml", settings, 2, folder / "log", prepare=prepare)
    deadline = time.monotonic() + PATIENCE_S
    while f"step {CUT_AFTER}/" not in start.text:
        assert time.monotonic() < deadline and all(rank.is_alive() for rank in start.ranks), start.text
        time.sleep(0.01)
    return start


def test_a_cable_that_is_pulled_for_a_while_costs_that_while_only(cable: Cable, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = _start(cable, tmp_path / "whole")
    (tmp_path / "whole" / "go_on").touch()
    assert whole.end() == [0, 0]
    start = _start(cable, tmp_path / "cut", "parallel.hang_minutes=2")
    cable.pull()
    (tmp_path / "cut" / "go_on").touch()
    time.sleep(CUT_S)
    cable.plug()
    assert start.end() == [0, 0], start.text
    assert curve(tmp_path / "cut" / "run") == curve(tmp_path / "whole" / "run")


def test_a_cable_that_is_pulled_for_good_ends_both_sides(cable: Cable, tmp_path: Path) -> None:
    start = _start(cable, tmp_path, "parallel.hang_minutes=0.3", "parallel.timeout_minutes=0.6")
    cable.pull()
    (tmp_path / "go_on").touch()
    assert all(start.end()), start.text
    said = [line for line in start.own_errors() if not line.startswith("stopped")]
    assert said and ("rank 1" in said[0] or "lost another rank" in said[0]), start.text
    cable.plug()
    again = _start(cable, tmp_path)
    (tmp_path / "go_on").touch()
    assert again.end() == [0, 0] and "resumed from" in again.text
    assert [row[0] for row in curve(tmp_path / "run")] == list(range(STEPS))
