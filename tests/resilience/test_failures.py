"""Who tells what when a rank ends: the one at fault, once, in one line where the cause is known."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine import waits
from engine.config.read import ParallelConfig
from engine.parallel.launch import job
from engine.resilience import failures
from engine.resilience.failures import note, reason, tell, tell_line
from engine.resilience.judge import UnhealthyStep

LOST = "[/a/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically …"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_LATER_S", 0.0)


def said(error: Exception, store: dist.Store, capsys: pytest.CaptureFixture[str]) -> str:
    note(error, store)
    assert tell(error) == 1
    return capsys.readouterr().err


def _hold_a_store(pipe: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


def test_a_store_that_stands_still_with_its_host_is_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "ANSWER_S", 0.2)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_hold_a_store, args=(theirs,), daemon=True)
    holder.start()
    try:
        store = dist.TCPStore("127.0.0.1", ours.recv(), is_master=False, wait_for_workers=False)
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGSTOP)
        assert "lost another rank (Read error" in said(RuntimeError(LOST), store, capsys)
    finally:
        holder.kill()
        holder.join()


def test_a_rank_that_only_lost_another_is_silent_once_the_cause_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    note(lost := RuntimeError(LOST), store)
    assert "injected" in said(ValueError("injected"), store, capsys)
    assert tell(lost) == 1 and capsys.readouterr().err == ""


def test_where_nobody_could_tell_the_loss_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    first = said(RuntimeError(LOST), store, capsys)
    assert first.startswith("error: rank 0 on ") and "lost another rank (Read error" in first and first.count("\n") == 1
    assert said(RuntimeError(LOST), store, capsys) == ""
    assert reason(RuntimeError(LOST)) == "lost another rank (Read error [127.0.0.1]:1: Connection reset by peer)"


def test_a_rank_that_waited_for_too_long_does_not_say_that_another_has_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A job that was stopped as a whole has lost nobody."""
    late = RuntimeError("[/a/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete")
    told = said(late, dist.HashStore(), capsys)
    assert "parallel.timeout_minutes, or the whole job was stopped for longer" in told and told.count("\n") == 1
    assert "ended first" not in told and "ended first" in said(RuntimeError(LOST), dist.HashStore(), capsys)


def test_a_rank_that_lost_another_leaves_its_last_collectives(tmp_path: Path) -> None:
    with job(ParallelConfig()) as (mesh, _):
        for rows in range(1, failures._KEPT + 2):
            dist.all_reduce(torch.zeros(rows, 5), group=mesh.alone.group)
        name = f"alone {mesh.alone.group.group_name[:8]}: "  # other tests of this process have had groups alike
    assert tell(RuntimeError(LOST), tmp_path) == tell(RuntimeError(LOST), tmp_path / "gone") == 1
    lines = (tmp_path / "hang" / "collectives_00000.txt").read_text().splitlines()
    own = [line for line in lines if line.startswith(name)]
    assert len(own) == failures._KEPT
    assert ": 2 gloo:all_reduce [[2, 5]] -> [[2, 5]] Float, " in own[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hang"]


def test_a_reader_that_dies_in_the_middle_of_a_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), dist.HashStore(), capsys)
    assert told.startswith("error: a reader of rank 0 on ") and told.count("\n") == 1 and "data.workers" in told


def test_the_rank_that_holds_the_store_stays_until_the_others_have_asked_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without torchrun the store ends with rank 0, and a rank that cannot ask tells the same once more."""
    monkeypatch.setattr(failures, "_LATER_S", 30.0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    store, order, told = dist.HashStore(), list[str](), threading.Event()

    def other_rank() -> None:
        told.wait()
        order.append("noted")
        note(UnhealthyStep("step 7"), store)

    other = threading.Thread(target=other_rank)
    other.start()
    note(own := UnhealthyStep("step 7"), store)
    told.set()
    assert tell_line(own) == 1
    order.append("left")
    other.join()
    assert order == ["noted", "left"] and capsys.readouterr().err == "error: step 7\n"


def test_a_rank_that_lost_the_one_at_fault_need_not_ask_again(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    note(ValueError("injected"), store)
    note(lost := RuntimeError(LOST), store)
    store.delete_key(failures._AT_FAULT)  # as the store itself is gone when the time has come to tell
    assert tell(lost) == 1 and capsys.readouterr().err == ""


def test_a_crash_in_foreign_code_leaves_the_stacks_of_all_threads() -> None:
    """A process of its own, as pytest has the same handler."""
    code = (
        "import os, signal, threading\n"
        "from engine.resilience.exit import crashes_leave_stacks\n"
        "crashes_leave_stacks()\n"
        "def waits(): threading.Event().wait()\n"
        "threading.Thread(target=waits, daemon=True).start()\n"
        "def crashes(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "crashes()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGSEGV
    for said in ("Fatal Python error: Segmentation fault", "in crashes", "in waits"):
        assert said in ended.stderr
