"""Who is late when a job stands still, judged from what the ranks say of themselves."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine.resilience.failures import tell
from engine.resilience.status import read_status
from engine.resilience.watch import HUNG, LOOKS_AROUND, Pulse, Watch, stacks_of_threads

LIMIT_S = 60.0


def place(part: str, for_s: float, *, beat: int = 1, step: int = 7, busy_s: float = 1.0, **more: Any) -> dict[str, Any]:
    values = {"beat": beat, "step": step, "part": part, "micro_batch": None, "for_s": for_s, "busy_s": busy_s}
    return values | {"host": "node", "pid": 1, **more}


def watch(store: dist.Store | None = None) -> Watch:
    return Watch(Pulse(), Path("run"), 0, 4, LIMIT_S, store)


def verdict(judge: Watch) -> str:
    assert judge._store is not None
    return judge._verdict(judge._store)


def test_a_rank_that_gives_no_sign_of_life_is_named_whatever_the_others_do() -> None:
    judge = watch()
    places = {rank: place("wait", 0.1) for rank in range(4)}
    assert judge._judge(places) == ""
    judge._seen[2] = (1, time.monotonic() - 2 * LIMIT_S)
    places = {rank: place("wait", 0.1, beat=1 if rank == 2 else 9, host=f"node{rank}") for rank in range(4)}
    assert judge._judge(places) == "no sign of life from rank 2 on node2 (pid 1) in 'wait' of step 7 for 60 s"


def test_a_rank_is_known_before_its_first_step_and_missed_from_there_on(tmp_path: Path) -> None:
    """A job of short steps may stop before a second is over, and with it the beats of a thread."""
    store = dist.HashStore()
    judge = watch(store)
    with Watch(Pulse(), tmp_path, 3, 4, LIMIT_S, store):
        told = json.loads(store.get("watch/3"))
    assert (told["beat"], told["part"]) == (0, "start")
    assert verdict(judge) == ""
    judge._began_s -= 2 * LIMIT_S
    assert verdict(judge) == "no sign of life from rank 0; rank 1; rank 2 since the start, 60 s ago"


def test_a_job_that_was_stopped_for_a_while_has_nobody_late() -> None:
    """A scheduler stops all its processes and lets them go on; or torchrun was stopped, and with it the store."""
    store = dist.HashStore()
    judge, other = watch(store), Watch(Pulse(), Path("run"), 1, 2, LIMIT_S, store)
    judge.size, before_s = 2, time.monotonic() - 10 * LIMIT_S
    for rank in (judge, other):
        rank.pulse.since_s = rank._began_s = rank._still_since_s = before_s
        rank._tell(1)
    judge._seen = {rank: (1, before_s) for rank in range(2)}
    assert (
        verdict(judge)
        == "no sign of life from "
        + "; ".join(
            f"rank {rank} on {socket.gethostname()} (pid {os.getpid()}) in 'start' of step 0" for rank in range(2)
        )
        + " for 60 s"
    )
    for rank in (judge, other):
        rank._notice_absence(before_s)
        rank._tell(2)
    assert verdict(judge) == ""
    began_s = judge._began_s
    judge._notice_absence(time.monotonic())
    assert judge._began_s == began_s


def test_a_rank_that_has_ended_in_order_is_not_missed(tmp_path: Path) -> None:
    """The first one may have much to write yet."""
    store = dist.HashStore()
    judge = watch(store)
    judge.size = 2
    judge._tell(1)
    with Watch(Pulse(), tmp_path, 1, 2, LIMIT_S, store):
        verdict(judge)
        assert judge._seen.keys() == {0, 1}
    judge._seen[1] = (0, time.monotonic() - 2 * LIMIT_S)
    assert verdict(judge) == ""


def test_a_rank_that_lost_others_names_those_that_have_fallen_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a host that is gone nobody else says a word."""
    store, lost = dist.HashStore(), RuntimeError("Read error [127.0.0.1]:1: Connection reset by peer")
    others = [Watch(Pulse(part="encode"), tmp_path, rank, 4, LIMIT_S, store) for rank in (1, 2, 3)]
    for other in others:
        other._tell(7)
    with pytest.raises(RuntimeError), Watch(Pulse(), tmp_path, 0, 4, LIMIT_S, store):
        raise lost
    with Watch(Pulse(), tmp_path, 3, 4, LIMIT_S, store):
        pass  # it has ended in order
    monkeypatch.setattr("engine.resilience.watch.time.sleep", lambda seconds: others[1]._tell(8))
    assert tell(lost) == 1
    who = f"no sign of life from rank 1 on {socket.gethostname()} (pid {os.getpid()}) in 'encode' of step 0"
    assert capsys.readouterr().err.endswith(f"Connection reset by peer): {who}\n")
    lost.told_elsewhere = True  # type: ignore[attr-defined]
    assert tell(lost) == 1 and not capsys.readouterr().err


def _rank_under_an_agent(run_dir: Path, environment: dict[str, str], moved_ago_s: float) -> None:
    os.environ.update(environment)
    rank = os.fork()
    if rank == 0:
        judge = Watch(Pulse(part="wait"), run_dir, 1, 2, LIMIT_S, None)
        judge._asked_s = judge._began_s = time.monotonic() - 2 * LIMIT_S
        judge.pulse.since_s = time.monotonic() - moved_ago_s
        judge._notice_mute_store()
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))


@pytest.mark.parametrize(
    ("environment", "moved_ago_s", "status"),
    [
        ({}, 0.0, 0),  # its steps go on
        ({}, 2 * LIMIT_S, HUNG),
        ({"TORCHELASTIC_RUN_ID": "x"}, 2 * LIMIT_S, -signal.SIGKILL),
    ],
)
def test_a_rank_that_stands_still_with_the_store_ends_and_takes_torchrun_with_it(
    environment: dict[str, str], moved_ago_s: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr("engine.resilience.watch._BEAT_S", 0.0)
    arguments = (tmp_path, environment, moved_ago_s)
    agent = multiprocessing.get_context("fork").Process(target=_rank_under_an_agent, args=arguments)
    agent.start()
    agent.join()
    assert agent.exitcode == status
    assert ("torchrun's store at" in capfd.readouterr().err) == (status != 0)


def _rank_without_its_agent(run_dir: Path, number: int) -> None:
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    judge = Watch(Pulse(part="wait"), run_dir, 1, 2, LIMIT_S, None)
    judge._asked_s = judge._began_s = judge.pulse.since_s = time.monotonic() - 2 * LIMIT_S
    judge._parent = number
    judge._notice_mute_store()


def test_who_has_the_number_of_a_torchrun_that_is_gone_is_not_killed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.resilience.watch._BEAT_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        arguments = (tmp_path, other.pid)
        rank = multiprocessing.get_context("fork").Process(target=_rank_without_its_agent, args=arguments)
        rank.start()
        rank.join()
        other.communicate(b"\n")
    assert (rank.exitcode, other.returncode) == (HUNG, 0)


def test_of_ranks_that_stand_still_those_that_wait_for_nobody_are_late() -> None:
    places = {rank: place("wait" if rank else "roll call", 90) for rank in range(4)}
    places[3] = place("encode", 95, micro_batch=2)
    said = watch()._judge(places)
    assert said.startswith(
        "nothing has moved for 60 s, the others wait for rank 3 on node (pid 1) in 'encode', micro-batch"
    )
    places[1] = place("wait", 3)
    assert watch()._judge(places) == ""


@pytest.mark.parametrize("part", ["start", "callbacks"])
def test_loading_saving_and_evaluation_take_as_long_as_they_take(part: str) -> None:
    ranks = [place(part if rank == 0 else "roll call", 900, still_s=3 if rank == 0 else 900) for rank in range(4)]
    assert watch()._judge(dict(enumerate(ranks))) == ""


def test_a_load_or_save_in_which_nothing_moves_is_found_and_who_waits_in_a_collective_is_not_named() -> None:
    ranks = [place("callbacks", 900, still_s=900, waits=rank != 2) for rank in range(4)]
    ranks[0] |= {"part": "roll call"}
    said = watch()._judge(dict(enumerate(ranks)))
    assert said.startswith("nothing has moved for 60 s, the others wait for rank 2 on node") and "rank 1" not in said


def test_a_thread_that_works_is_movement_and_one_that_looks_around_is_none() -> None:
    there, go_on = threading.Barrier(3), [threading.Event(), threading.Event()]

    def wait_twice(number: int) -> None:
        there.wait()
        go_on[number].wait()
        there.wait()
        threading.Event().wait()

    names = ("writer", f"commit {LOOKS_AROUND}")
    for number, name in enumerate(names):
        threading.Thread(target=wait_twice, args=(number,), name=name, daemon=True).start()
    there.wait()
    idents = {thread.name: thread.ident for thread in threading.enumerate() if thread.ident is not None}
    before = stacks_of_threads()
    for event in go_on:
        event.set()
    there.wait()
    after = stacks_of_threads()
    assert before[idents["writer"]] != after[idents["writer"]]
    assert idents[names[1]] not in before | after and threading.main_thread().ident in after


def test_the_pulse_says_where_a_rank_is_and_how_long_it_computed() -> None:
    pulse = Pulse()
    pulse.at("encode", type("Unit", (), {"micro_batch": 3}))
    assert (pulse.part, pulse.micro_batch) == ("encode", 3)
    pulse.step_done(4, {"encode": 1.0, "backward": 2.0, "wait": 50.0, "reduce": 9.0})
    assert (pulse.step, pulse.busy_s) == (4, 3.0)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_computes_longer_step_after_step_is_named_once(size: int, capfd) -> None:
    judge = watch()
    added: list[str] = []
    judge._store = type("Store", (), {"add": lambda self, key, one: added.append(key) or len(added)})()  # type: ignore
    for step in range(8):
        judge._judge_pace({rank: place("wait", 0, step=step, busy_s=2.0 if rank == 1 else 1.0) for rank in range(size)})
    assert capfd.readouterr().err == "WARNING: rank 1 on node computes 2.00 s a step, most ranks 1.00 s\n"
    assert judge.pulse.slow == {1: 2.0}
    judge._judge_pace({rank: place("wait", 0, step=9) for rank in range(size)})
    assert not judge.pulse.slow


def test_the_status_says_what_stood_still_for_the_thread_that_cannot(tmp_path: Path) -> None:
    store = dist.HashStore()
    for rank in (1, 0):
        judge = Watch(Pulse(), tmp_path, rank, 2, LIMIT_S, store)
        judge.pulse.step = 6
        judge._say_why("nothing has moved for 60 s")
        assert (read_status(tmp_path) == {}) == (rank == 1), "one rank writes it"
    status = read_status(tmp_path)
    assert (status["outcome"], status["step"], status["reason"]) == ("failed", 7, "nothing has moved for 60 s")
