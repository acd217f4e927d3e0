"""No decision follows the machine's clock, which may be set while a job runs."""

import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from engine.waits import Flag

ROOT = Path(__file__).resolve().parents[2]


def test_a_flag_is_waited_for_until_it_is_up_or_the_time_is_over() -> None:
    flag, told = Flag(), list[bool]()
    assert not flag.wait(0) and not flag.wait(0.001) and not flag.is_set()
    threads = [threading.Thread(target=lambda: told.append(flag.wait(300))) for _ in range(2)]
    for thread in threads:
        thread.start()
    flag.set()
    flag.set()
    for thread in threads:
        thread.join()
    assert told == [True, True] and flag.is_set()
    flag.clear()
    flag.clear()
    assert not flag.is_set()


def test_a_flag_that_nobody_has_any_more_holds_no_descriptor() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    flags = [Flag() for _ in range(9)]
    assert len(os.listdir("/proc/self/fd")) == before + len(flags)
    del flags
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_engine_waits_for_nothing_that_the_clock_of_the_machine_prolongs() -> None:
    """engine/waits.py says of which Pythons."""
    waits = re.compile(r"threading\.(Event|Condition|Semaphore|BoundedSemaphore|Timer|Barrier)\(|queue\.Queue\(")
    assert [
        str(path) for path in sorted((ROOT / "engine").rglob("*.py")) if waits.search(path.read_text(encoding="utf-8"))
    ] == []


def test_a_script_that_never_left_its_job_ends() -> None:
    """The job's end asks its store when the interpreter collects it, where a thread would never start."""
    script = (
        "from engine.waits import answer_of\n"
        "class Job:\n"
        "    def __del__(self, answer_of=answer_of, tell=print):\n"
        "        tell(answer_of(lambda: 'answered', 'not asked'), flush=True)\n"
        "job = Job()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "not asked\n"), ended.stderr
