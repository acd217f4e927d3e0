"""Which signals are a wish, and to whom."""

import multiprocessing
import os
import signal
import time

import pytest

from engine.resilience.signals import Wishes

HEARD, IGNORED = 7, 8


def _told(number: signal.Signals, nohup: bool, under_torchrun: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    if under_torchrun:
        os.environ["RANK"] = "0"
    with Wishes() as wishes, wishes.wait_for_steps():
        if signal.getsignal(number) is signal.SIG_IGN:
            os._exit(IGNORED)
        os.kill(os.getpid(), number)
        while wishes.stop != number.name:  # a thread takes it down
            time.sleep(0.001)
        os._exit(HEARD)


@pytest.mark.parametrize(
    ("number", "nohup", "under_torchrun", "outcome"),
    [
        (signal.SIGTERM, False, False, HEARD),
        (signal.SIGUSR1, False, True, HEARD),
        (signal.SIGHUP, False, False, HEARD),  # the terminal was closed
        (signal.SIGHUP, False, True, HEARD),  # torchrun's was, which passes it on and ends
        (signal.SIGHUP, True, True, HEARD),  # torchrun sets nohup aside
        (signal.SIGHUP, True, False, IGNORED),
    ],
)
def test_a_wish(number: signal.Signals, nohup: bool, under_torchrun: bool, outcome: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_told, args=(number, nohup, under_torchrun))
    process.start()
    process.join()
    assert process.exitcode == outcome
