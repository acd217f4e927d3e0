"""Two disturbances at once, and folders that are not where they seem: each ends as its policy says, and goes on."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.format.lock import LOCK_FILE
from engine.resilience.exit import STOPPED
from engine.resilience.status import read_status
from tests.chaos import faults
from tests.chaos.faults import Place
from tests.chaos.matrix import CONFIG, STEPS, curve
from tests.chaos.ranks import TINY, launch
from tests.data.shard_factory import make_shards

AT = 5
REWINDS = ("health.on_nonfinite=rewind",)

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def _at_step(step: int, do: Callable[[Any, Any], None], rank: int) -> None:
    """Have the only rank do something when it enters the reduction of a step; run in it before the job. do: gets the
    trainer, and what the process was asked for.
    """
    from engine.resilience.watch import Pulse
    from engine.trainer import Trainer

    running: list[tuple[Any, Any]] = []
    begin, fit = Pulse.at, Trainer.fit

    def fitted(trainer: Trainer, callbacks: Any, wishes: Any) -> str:
        running.append((trainer, wishes))
        return fit(trainer, callbacks, wishes)

    def at(pulse: Pulse, part: str, unit: Any = None) -> None:
        begin(pulse, part, unit)
        if part == "reduce" and pulse.step + 1 == step and running:
            do(*running[0])

    Pulse.at, Trainer.fit = at, fitted  # type: ignore[method-assign, assignment]


def _nan_and_signal_in_the_rewind(number: int, trainer: Any, wishes: Any) -> None:
    from engine.resilience import rewind

    load = rewind.load_state

    def loading(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        while not wishes.stop:  # a thread takes it down
            time.sleep(0.01)
        return load(*arguments)

    rewind.load_state = loading  # type: ignore[assignment]
    faults.nan_gradient(_nowhere(), trainer)


def _signal_twice(trainer: Any, wishes: Any) -> None:
    """The second one more than a second after the first, while the step does not end."""
    from engine.resilience import signals

    signals._ONE_WISH_S = 0.0
    os.kill(os.getpid(), signal.SIGTERM)
    while not wishes.stop:  # a thread takes it down
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()


def _stop_in_the_save_of_the_next_step(trainer: Any, wishes: Any) -> None:
    """The roll call hears of it while the save is under way."""
    from engine.checkpoint import save
    from engine.resilience.roll_call import RollCall

    write, call, begin = save.write_rank, RollCall.__call__, save.CheckpointSaver.save
    asked, heard = threading.Event(), threading.Event()

    def writing(folder: Path, *arguments: Any) -> Any:
        (folder.parents[1] / "STOP").touch()
        asked.set()
        heard.wait()
        return write(folder, *arguments)

    def saving(*arguments: Any) -> None:
        begin(*arguments)
        asked.wait()

    def calling(*arguments: Any) -> Any:
        orders, sums = call(*arguments)
        if orders.stop:
            heard.set()
        return orders, sums

    save.write_rank, save.CheckpointSaver.save = writing, saving  # type: ignore[assignment, method-assign]
    RollCall.__call__ = calling  # type: ignore[method-assign, assignment]


def _clock_goes_back(trainer: Any, wishes: Any) -> None:
    true = time.time
    time.time = lambda: true() - 3600


def _nan_then_killed_in_the_next_save(trainer: Any, wishes: Any) -> None:
    from engine.checkpoint import save

    def writing(folder: Path, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    save.write_rank = writing  # type: ignore[assignment]
    faults.nan_gradient(_nowhere(), trainer)


def _nowhere() -> Place:
    return Place(0, AT, "reduce", Path(), Path(), Path())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("shards"), [20, 28])


def _settings(shards: list[str], run_dir: Path, *more: str) -> list[str]:
    own = [f"data.shards=[{','.join(shards)}]", f"run_dir={run_dir}", f"train.steps={STEPS}", "data.workers=0"]
    return [*TINY, *own, "checkpoint.every_steps=2", *more]


CASES: dict[str, tuple[Callable[[Any, Any], None], tuple[str, ...], int, str]] = {
    "SIGTERM during a rewind": (
        partial(_nan_and_signal_in_the_rewind, signal.SIGTERM), REWINDS, STOPPED, "stopped by SIGTERM after step ",
    ),
    "kill -9 during a rewind": (
        partial(_nan_and_signal_in_the_rewind, signal.SIGKILL), REWINDS, -signal.SIGKILL, "",
    ),
    "kill -9 in the save after a rewind": (_nan_then_killed_in_the_next_save, REWINDS, -signal.SIGKILL, ""),
    "STOP while a save is under way": (_stop_in_the_save_of_the_next_step, (), STOPPED, "/STOP after step "),
    "the clock goes back an hour": (_clock_goes_back, (), 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_at_once(name: str, shards: list[str], tmp_path: Path) -> None:
    do, more, status, says = CASES[name]
    run_dir = tmp_path / "run"
    start = launch(CONFIG, _settings(shards, run_dir, *more), 1, tmp_path / "log", prepare=partial(_at_step, AT, do))
    assert start.end() == [status], start.text
    said = start.own_errors()
    assert len(said) == bool(says) and says in "".join(said), start.text
    if status:
        again = launch(CONFIG, _settings(shards, run_dir, *more), 1, tmp_path / "again")
        assert again.end() == [0] and "resumed from" in again.text, again.text
    assert [row[0] for row in curve(run_dir)] == list(range(STEPS))
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_a_second_signal_ends_the_step_and_the_status_says_so(shards: list[str], tmp_path: Path) -> None:
    """It would say for ever that the job runs."""
    run_dir = tmp_path / "run"
    prepare = partial(_at_step, AT, _signal_twice)
    start = launch(CONFIG, _settings(shards, run_dir), 1, tmp_path / "log", prepare=prepare)
    assert start.end() == [128 + signal.SIGTERM], start.text
    status = read_status(run_dir)
    assert (status["outcome"], status["step"], status["reason"]) == ("failed", AT, "SIGTERM again: stopped at once")
    assert (run_dir / LOCK_FILE).read_text() == "", "the folder is given back"


def test_a_run_behind_links_is_the_same_run(shards: list[str], tmp_path: Path) -> None:
    """Its folder and that of its checkpoints are links; the checkpoints then move to another disk, and their link."""
    real, disk, moved = tmp_path / "real", tmp_path / "disk", tmp_path / "moved"
    for folder in (real, disk):
        folder.mkdir()
    (tmp_path / "run").symlink_to(real)
    (real / "checkpoints").symlink_to(disk)
    settings = _settings(shards, tmp_path / "run")
    first = launch(CONFIG, settings, 1, tmp_path / "log", prepare=partial(_at_step, AT, faults_kill))
    assert first.end() == [-signal.SIGKILL], first.text
    (real / "checkpoints").unlink()
    disk.rename(moved)
    (real / "checkpoints").symlink_to(moved)
    rewinds = launch(CONFIG, [*settings, *REWINDS], 1, tmp_path / "again", prepare=partial(_at_step, AT, faults_nan))
    assert rewinds.end() == [0] and "resumed from" in rewinds.text and "(1 rewinds so far)" in rewinds.text
    assert [row[0] for row in curve(real)] == list(range(STEPS))


def faults_kill(trainer: Any, wishes: Any) -> None:
    """The rank is gone."""
    os.kill(os.getpid(), signal.SIGKILL)


def faults_nan(trainer: Any, wishes: Any) -> None:
    """One gradient is not a number."""
    faults.nan_gradient(_nowhere(), trainer)
