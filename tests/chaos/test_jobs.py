"""Real jobs under torchrun, disturbed: what they say, what they leave, and that they go on to the bit.

Every case disturbs a job of two stages after its sixth step. `EVA_WRITE_TABLES=1 pytest tests/chaos -m ""` writes the
table of docs/results/reliability.md. Slow, all of them: torchrun and its imports take ten seconds a start. What
torchrun has no part in is in test_matrix.py.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_factory import make_shards
from tests.engine.test_resume import curve, start

STEPS, EVERY, AFTER = 30, 10, 6
PATIENCE_S = 900
"""Of a machine that others share; an idle one needs a twentieth."""
OPTIONS = (f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "train.logit_scale=null")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "reliability.md"
BEGIN, END = "<!-- table of tests/chaos -->\n", "<!-- end of the table -->\n"

pytestmark = pytest.mark.dist


@dataclass
class Job:
    """A job under torchrun that may be disturbed."""

    process: subprocess.Popen[str]
    run_dir: Path
    lines: list[str] = field(default_factory=list)

    def until(self, text: str) -> None:
        """Read its output up to a line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(text):
                return
        raise AssertionError(f"no line begins with {text!r}:\n" + "".join(self.lines))

    def end(self) -> int:
        """Read on to its end; torchrun's status. A job that does not end in time is killed: its ranks hear of it."""
        try:
            rest, _ = self.process.communicate(timeout=PATIENCE_S)
        finally:
            self.process.kill()  # nothing to one that has ended
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode

    def ranks(self) -> dict[int, int]:
        """Rank -> process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for child in map(int, children):
            entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next(entry for entry in entries if entry.startswith(b"RANK="))
            found[int(rank.partition(b"=")[2])] = child
        return found

    def own_lines(self) -> list[str]:
        """Without what torchrun and torch's warnings say."""
        torchrun = next((i for i, line in enumerate(self.lines) if line.startswith("Traceback")), len(self.lines))
        return [line for line in self.lines[:torchrun] if "torch/distributed" not in line and "Warning" not in line]


@dataclass(frozen=True)
class Case:
    """One disturbance and what has to come of it."""

    name: str
    disturb: Callable[[Job], None]
    says: str
    """A part of one line of the job's own output."""
    lost: int
    """Most steps that have to be done again: since a checkpoint, and while the next one was written."""
    status: str = "stopped"
    """Outcome in status.json."""
    overrides: tuple[str, ...] = ()
    ends_well: bool = False
    """The job goes on by itself."""


def signal_to(number: int, rank: int | None = None, group: bool = False) -> Callable[[Job], None]:
    """To torchrun, its process group, or a rank."""

    def send(job: Job) -> None:
        pid = job.process.pid if rank is None else job.ranks()[rank]
        os.kill(pid, number)

    return send


def touch(name: str) -> Callable[[Job], None]:
    """A file in the run folder."""
    return lambda job: (job.run_dir / name).touch()


def kill_torchrun(job: Job) -> None:
    """Without a word; the ranks have to end by themselves."""
    ranks = job.ranks().values()
    job.process.kill()
    deadline = time.monotonic() + PATIENCE_S
    while any(_alive(pid) for pid in ranks):
        assert time.monotonic() < deadline, "orphans hold the devices"
        os.sched_yield()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


STOP_LINE = "stopped by {} after step "
CASES = [
    Case("SIGTERM to torchrun", signal_to(signal.SIGTERM), STOP_LINE.format("SIGTERM"), 0),
    Case("SIGINT to torchrun", signal_to(signal.SIGINT), STOP_LINE.format("SIGINT"), 0),
    Case("SIGUSR1 to rank 1", signal_to(signal.SIGUSR1, rank=1), STOP_LINE.format("SIGUSR1"), 0),
    Case("touch STOP", touch("STOP"), "/STOP after step ", 0),
    Case("touch SAVE", touch("SAVE"), "asked to save after step ", 0, status="finished", ends_well=True),
    Case("kill -9 of torchrun", kill_torchrun, STOP_LINE.format("SIGTERM"), 0),
    Case("kill -9 of rank 1", signal_to(signal.SIGKILL, rank=1), "lost another rank", 2 * EVERY, status="failed"),
    Case(
        "SIGSTOP of rank 1",
        signal_to(signal.SIGSTOP, rank=1),
        "error: no sign of life from rank 1 on ",
        2 * EVERY,
        status="failed",
        overrides=("parallel.hang_minutes=0.2",),
    ),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("shards"), [40, 30, 30])


@pytest.fixture(scope="module")
def undisturbed(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    job = Job(start(shards, tmp_path_factory.mktemp("runs") / "undisturbed", *OPTIONS), Path())
    assert job.end() == 0, "".join(job.lines)
    return curve(Path(next(line.split("files in ")[1] for line in job.lines if "files in " in line).strip()))


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    if os.environ.get("EVA_WRITE_TABLES") and len(rows) > 1:
        head = "| what was done after step 6 | outcome | seconds until all ended | steps done again | then |\n"
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        lines = [head, "| --- | --- | --- | --- | --- |\n", *rows]
        PAGE.write_text("".join([before, BEGIN, *lines, END, after]), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_disturbed_job_says_so_in_one_line_and_goes_on_to_the_bit(
    case: Case, shards: list[str], undisturbed: list[tuple[Any, ...]], table: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = Job(start(shards, run_dir, *OPTIONS, *case.overrides), run_dir)
    job.until(f"step {AFTER}/")
    began = time.monotonic()
    case.disturb(job)
    status = job.end()
    seconds = time.monotonic() - began
    own = [line for line in job.own_lines() if "error" in line or "stopped" in line or "asked" in line]
    assert len(own) == 1 and case.says in own[0], "".join(job.lines)
    assert (status == 0) == case.ends_well
    outcome = json.loads((run_dir / "status.json").read_text())["outcome"]
    assert outcome == case.status
    reached = len(curve(run_dir))
    again = 0
    if not case.ends_well:
        assert (run_dir / "run.lock").read_text() == "" or case.status != "stopped"
        second = Job(start(shards, run_dir, *OPTIONS), run_dir)
        assert second.end() == 0, "".join(second.lines)
        went_on = next((line for line in second.lines if line.startswith("resumed from")), "(step 0)")
        again = reached - int(went_on.split("(step ")[1].split(")")[0])
    assert curve(run_dir) == undisturbed
    assert again <= case.lost
    assert not list((run_dir / "checkpoints").glob(".*"))
    stacks = run_dir / "hang" / "rank_00000.txt"
    assert stacks.exists() == ("SIGSTOP" in case.name)
    said = own[0].split(" after")[0].split(" (")[0].replace(str(run_dir), "run_dir").strip()[:70]
    table.append(f"| {case.name} | {outcome}: `{said}` | {seconds:.0f} | {again} | equal to the bit |\n")


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_torchrun_and_goes_on_to_the_bit(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Before the first checkpoint and after it, in one job; a stop that was asked for is not started again."""
    run_dir = tmp_path / "run"
    job = Job(start(shards, run_dir, *OPTIONS, torchrun=("--max-restarts", "3")), run_dir)
    job.until("step 2/")
    signal_to(signal.SIGKILL, rank=1)(job)
    job.until(f"step {EVERY + AFTER}/")
    signal_to(signal.SIGKILL, rank=0)(job)
    job.until(f"step {EVERY + AFTER + 2}/")
    (run_dir / "STOP").touch()
    assert job.end() != 0
    assert sum("resumed from" in line for line in job.lines) == 1  # the first restart was before any checkpoint
    assert json.loads((run_dir / "status.json").read_text())["outcome"] == "stopped"
    second = Job(start(shards, run_dir, *OPTIONS), run_dir)
    assert second.end() == 0
    assert curve(run_dir) == undisturbed


@pytest.mark.slow
def test_a_job_goes_on_while_torchrun_is_stopped(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """It holds the store in which ranks tell each other that they live: none of them is late for that."""
    run_dir = tmp_path / "run"
    job = Job(start(shards, run_dir, *OPTIONS, "parallel.hang_minutes=0.2"), run_dir)
    job.until(f"step {AFTER}/")
    signal_to(signal.SIGSTOP)(job)
    try:
        job.until(f"step {AFTER + 3}/")
        time.sleep(18)  # longer than a rank may be silent
    finally:
        signal_to(signal.SIGCONT)(job)
    assert job.end() == 0, "".join(job.lines)
    assert not [line for line in job.own_lines() if "error" in line], "".join(job.lines)
    assert curve(run_dir) == undisturbed


@pytest.mark.slow
def test_a_bare_torchrun_outlives_its_terminal_under_nohup_when_it_is_told_to(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """It would hear SIGHUP all the same, whatever it has inherited."""
    run_dir, before = tmp_path / "run", signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        torchrun = ("--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT")
        job = Job(start(shards, run_dir, *OPTIONS, torchrun=torchrun), run_dir)
    finally:
        signal.signal(signal.SIGHUP, before)
    job.until(f"step {AFTER}/")
    signal_to(signal.SIGHUP)(job)
    assert job.end() == 0, "".join(job.lines)
    assert curve(run_dir) == undisturbed


@pytest.mark.slow
def test_a_bad_shard_on_the_first_stage_is_one_line(shards: list[str], tmp_path: Path) -> None:
    """The second stage reads nothing; it must not bury the line under its own traceback."""
    broken = tmp_path / "broken.tar"
    broken.write_bytes(Path(shards[0]).read_bytes()[:3000])
    job = Job(start([str(broken)], tmp_path / "run", *OPTIONS), tmp_path / "run")
    assert job.end() != 0
    own = job.own_lines()
    assert sum(line.startswith("error: ") for line in own) == 1 and "broken.tar" in "".join(own), "".join(job.lines)
