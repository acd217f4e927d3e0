"""Who tells what when a rank ends: the one at fault, once, in one line where the cause is known."""

import pytest
import torch.distributed as dist

from engine.resilience import failures
from engine.resilience.failures import note, tell

LOST = "[/a/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically …"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_LATER_S", 0.0)


def said(error: Exception, store: dist.Store, capsys: pytest.CaptureFixture[str]) -> str:
    note(error, store)
    assert tell(error) == 1
    return capsys.readouterr().err


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


def test_a_reader_that_dies_in_the_middle_of_a_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), dist.HashStore(), capsys)
    assert told.startswith("error: a reader of rank 0 on ") and told.count("\n") == 1 and "data.workers" in told
