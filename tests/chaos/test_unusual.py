"""What happens to jobs more rarely than tests/chaos/matrix.py has it: each ends as its policy says, and goes on."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.callbacks.history import read_history, toll
from engine.callbacks.metrics import METRICS_FILE, read_metrics
from engine.resilience.exit import STOPPED
from engine.resilience.status import read_status
from engine.resilience.watch import HUNG
from tests.chaos import faults
from tests.chaos.matrix import CLOSE, CONFIG, STEPS, curve, may_mount
from tests.chaos.ranks import TINY, children_of, launch, send, wait_until_stopped
from tests.data.shard_factory import make_shards

STOPPED_S = 24.0
LIMIT = "parallel.hang_minutes=0.2"
"""Half of STOPPED_S."""
AT = 4

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("shards"), [20, 28])


def _settings(shards: list[str], run_dir: Path, *more: str) -> list[str]:
    given = {setting.partition("=")[0] for setting in more}
    own = [f"data.shards=[{','.join(shards)}]", f"run_dir={run_dir}", f"train.steps={STEPS}", "data.workers=0"]
    usual = [*TINY, *own, "checkpoint.every_steps=2"]
    return [*(setting for setting in usual if setting.partition("=")[0] not in given), *more]


@pytest.fixture(scope="module")
def undisturbed(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    start = launch(CONFIG, _settings(shards, folder / "run"), 2, folder / "log")
    assert start.end() == [0, 0], start.text
    return curve(folder / "run")


def _at_step(step: int, of_rank: int, do: Callable[[Any], None], rank: int, part: str = "encode") -> None:
    """Have a rank do something when it begins a step, or another part of it; run in each rank before the job."""
    from engine.resilience.watch import Pulse
    from engine.trainer import Trainer

    if rank != of_rank:
        return
    trainers: list[Any] = []
    begin, fit = Pulse.at, Trainer.fit

    def fitted(trainer: Any, *arguments: Any) -> str:
        trainers[:] = [trainer]
        return fit(trainer, *arguments)

    def at(pulse: Any, begun: str, unit: Any = None) -> None:
        begin(pulse, begun, unit)
        if trainers and begun == part and pulse.step + 1 == step:  # of each micro-batch
            do(trainers.pop())

    Pulse.at, Trainer.fit = at, fitted  # type: ignore[method-assign, assignment]


# --- all stand still -------------------------------------------------------------------------------------------------


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    return [pid, *(other for child in children_of(pid) for other in _tree(child))]


def _stop_all(scratch: Path, trainer: Any) -> None:
    """As `scontrol suspend` does; an own process has them go on."""
    ranks = [int(path.read_text()) for path in scratch.glob("pid_*")]
    processes = [pid for rank in ranks for pid in _tree(rank)]
    if os.fork() == 0:
        wait_until_stopped(processes)
        time.sleep(STOPPED_S)
        for pid in processes:
            send(pid, signal.SIGCONT)
        os._exit(0)
    for pid in sorted(processes, key=lambda pid: pid == os.getpid()):
        send(pid, signal.SIGSTOP)


def _note_and_stop_all(scratch: Path, rank: int) -> None:
    (scratch / f"pid_{rank}").write_text(str(os.getpid()))
    _at_step(AT, 0, partial(_stop_all, scratch), rank)


def test_a_job_that_a_scheduler_stops_for_a_while_goes_on(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """For longer than a rank may be silent, and longer than a reader: nobody of them was late."""
    settings = _settings(shards, tmp_path / "run", LIMIT, "data.workers=1", "data.stall_timeout_s=12")
    start = launch(CONFIG, settings, 2, tmp_path / "log", prepare=partial(_note_and_stop_all, tmp_path))
    assert start.end() == [0, 0] and not start.own_errors(), start.text
    assert curve(tmp_path / "run") == undisturbed


def _stop_itself(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_ends_where_the_store_stands_still_with_the_first_host(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Nobody is left who could judge."""
    settings = _settings(shards, tmp_path / "run", LIMIT)
    start = launch(CONFIG, settings, 2, tmp_path / "log", prepare=partial(_at_step, AT, 0, _stop_itself))
    assert start.end() == [-signal.SIGKILL, HUNG], start.text
    (said,) = start.own_errors()
    assert said.startswith("error: rank 1 on ") and "torchrun's store at 127.0.0.1:" in said, start.text
    assert (tmp_path / "run" / "hang" / "rank_00001.txt").is_file()
    again = launch(CONFIG, settings, 2, tmp_path / "again")
    assert again.end() == [0, 0] and curve(tmp_path / "run") == undisturbed, again.text


def _stop_all_while_the_other_waits(scratch: Path, trainer: Any) -> None:
    while not (scratch / "waits").exists():
        time.sleep(0.01)
    _stop_all(scratch, trainer)


def _note_and_stop_a_wait(scratch: Path, rank: int) -> None:
    (scratch / f"pid_{rank}").write_text(str(os.getpid()))
    _at_step(AT, 0, partial(_stop_all_while_the_other_waits, scratch), rank)
    _at_step(AT, 1, lambda trainer: (scratch / "waits").touch(), rank, part="loss")


def test_a_job_that_is_stopped_for_longer_than_a_collective_may_take_can_be_started_again(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """gloo's clock goes on meanwhile: whoever waited when the job was stopped gives up when it goes on."""
    settings = _settings(shards, tmp_path / "run")
    limits = ["parallel.timeout_minutes=0.2", LIMIT]
    prepare = partial(_note_and_stop_a_wait, tmp_path)
    start = launch(CONFIG, [*settings, *limits], 2, tmp_path / "log", prepare=prepare)
    if any(start.end()):  # where it did not wait yet, it goes on
        (said,) = start.own_errors()
        assert "the whole job was stopped for longer" in said and "Traceback" not in start.text, start.text
        assert read_status(tmp_path / "run")["outcome"] == "failed"
        again = launch(CONFIG, settings, 2, tmp_path / "again")
        assert again.end() == [0, 0] and "resumed from" in again.text, again.text
    assert curve(tmp_path / "run") == undisturbed


# --- a batch that memory forgets -------------------------------------------------------------------------------------


def _forget(what: str, rank: int) -> None:
    """One bit of what the second rank has taken for a step ahead; run in each rank before the job."""
    from engine import feed

    if rank != 1:
        return
    take, asked = feed._units_of_a_step, []

    def taken(*arguments: Any, **named: Any) -> Any:
        read: Any
        (read,) = take(*arguments, **named)
        asked.append(read)
        if len(asked) == AT:
            values = {"captions": read.tokens, "pixels": read.images}.get(what)
            if values is None:
                read.positions[-1] ^= 1 << 20
            else:
                values.view(-1).view(torch.uint8)[9] ^= 4
        return [read]

    feed._units_of_a_step = taken


@pytest.mark.parametrize("what", ["captions", "positions"])
def test_a_batch_that_memory_forgets_before_its_step_is_one_line(
    what: str, shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    settings = _settings(shards, tmp_path / "run")
    start = launch(CONFIG, settings, 2, tmp_path / "log", prepare=partial(_forget, what))
    assert all(start.end()), start.text
    (said,) = start.own_errors()
    assert "memory" in said and "take the host out of the job" in said, start.text
    assert [row[0] for row in curve(tmp_path / "run")] == list(range(AT - 1))
    again = launch(CONFIG, settings, 2, tmp_path / "again")
    assert again.end() == [0, 0] and curve(tmp_path / "run") == undisturbed, again.text


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    if not may_mount():
        pytest.skip("no right to mount a tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(run_dir: Path, trainer: Any) -> None:
    faults.fill(faults.Place(1, AT, "encode", run_dir, Path(), Path()), trainer)


def test_a_job_that_waits_for_room_is_stopped_in_time(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    with _small_disk(tmp_path) as disk:
        run_dir = disk / "run"
        settings = _settings(shards, run_dir, "checkpoint.on_full=wait")
        start = launch(CONFIG, settings, 2, tmp_path / "log", prepare=partial(_at_step, AT, 1, partial(_fill, run_dir)))
        while "training waits for room" not in start.text:
            assert all(rank.is_alive() for rank in start.ranks), start.text
            time.sleep(0.01)
        pid = start.ranks[1].pid
        assert pid is not None
        send(pid, signal.SIGTERM)
        assert start.end() == [STOPPED, STOPPED], start.text
        last = f"the last checkpoint is step_{AT:08d}"
        assert start.own_errors() == [f"stopped by SIGTERM after step {AT + 2}: not saved; {last}"], start.text
        status, unsaved = read_status(run_dir), f"the state after step {AT + 2} was not saved"
        assert (status["outcome"], status["reason"]) == ("stopped", f"SIGTERM; {unsaved}, {last}")
        (disk / "filler").unlink()
        again = launch(CONFIG, settings, 2, tmp_path / "again")
        assert again.end() == [0, 0] and curve(run_dir) == undisturbed, again.text


def _fill_and_flip(run_dir: Path, trainer: Any) -> None:
    _fill(run_dir, trainer)
    faults.flipped_moment(faults.Place(1, AT, "encode", run_dir, Path(), Path()), trainer)


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_a_suspect_is_set_aside_on_a_disk_that_is_full(policy: str, shards: list[str], tmp_path: Path) -> None:
    with _small_disk(tmp_path) as disk:
        run_dir = disk / "run"
        settings = _settings(shards, run_dir, f"health.on_divergence={policy}")
        prepare = partial(_at_step, AT, 1, partial(_fill_and_flip, run_dir))
        start = launch(CONFIG, settings, 2, tmp_path / "log", prepare=prepare)
        assert all(start.end()), start.text
        (said,) = start.own_errors()
        assert ("state has changed" if policy == "stop" else "cannot save") in said, start.text
        assert [path.name for path in (run_dir / "checkpoints").glob("*.suspect")] == [f"step_{AT:08d}.suspect"]
        (disk / "filler").unlink()
        again = launch(CONFIG, settings, 2, tmp_path / "again")
        assert again.end() == [0, 0] and f"step_{AT - 2:08d} (step {AT - 2})" in again.text, again.text
        assert [row[0] for row in curve(run_dir)] == list(range(STEPS))


# --- clocks that are set ---------------------------------------------------------------------------------------------


def _set_clocks(rank: int) -> None:
    """The second host is three hours behind; the first one's clock is set twice, forwards and back."""
    real, off = time.time, [-3 * 3600.0 * rank]
    time.time = lambda: real() + off[0]  # type: ignore[assignment]
    time.time_ns = lambda: int(1e9 * time.time())  # type: ignore[assignment]
    steps = {2: 26 * 3600.0, 5: -40 * 3600.0}
    from engine.resilience.watch import Pulse

    begin = Pulse.at

    def at(pulse: Any, begun: str, unit: Any = None) -> None:
        begin(pulse, begun, unit)
        if rank == 0 and begun == "encode":
            off[0] = steps.get(pulse.step + 1, off[0])

    Pulse.at = at  # type: ignore[method-assign, assignment]


def test_clocks_that_are_set_while_a_job_runs_decide_nothing(
    shards: list[str], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    settings = _settings(shards, tmp_path / "run", LIMIT, "log.json=true", "data.workers=1")
    start = launch(CONFIG, settings, 2, tmp_path / "log", prepare=_set_clocks)
    assert start.end() == [0, 0] and not start.own_errors(), start.text
    assert curve(tmp_path / "run") == undisturbed
    stamps = [event["time"] for event in read_history(tmp_path / "run")]
    assert stamps[-1] < stamps[0] - 24 * 3600, "the clock was set"
    cost = toll(tmp_path / "run", read_metrics(tmp_path / "run" / METRICS_FILE))
    assert cost is not None and 0 < cost.goodput <= 1


# --- fewer ranks behind a border of phases ---------------------------------------------------------------------------


def _killed(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_goes_on_with_fewer_ranks_on_both_sides_of_a_border(shards: list[str], tmp_path: Path) -> None:
    """Killed in the last step of a phase, in the first one of the next (nothing is saved behind the border yet) and
    after a save there.
    """
    phases = "phases=[{name: one, samples: 32}, {name: two, samples: 32}]"
    whole = launch(CONFIG, _settings(shards, tmp_path / "whole", phases), 2, tmp_path / "log")
    assert whole.end() == [0, 0], whole.text
    wanted = curve(tmp_path / "whole")
    for step in (AT - 1, AT, AT + 3):
        settings = _settings(shards, tmp_path / f"run{step}", phases)
        start = launch(CONFIG, settings, 2, tmp_path / "log", prepare=partial(_at_step, step, 0, _killed))
        assert all(start.end()), start.text
        alone = launch(CONFIG, settings, 1, tmp_path / "alone")
        assert alone.end() == [0] and re.search("(resumed|goes on) from", alone.text), alone.text
        found = curve(tmp_path / f"run{step}")
        assert [row[0] for row in found] == list(range(STEPS))
        assert all(abs(a[1] - b[1]) < CLOSE * abs(b[1]) for a, b in zip(found, wanted, strict=True))
        shutil.rmtree(tmp_path / f"run{step}")
