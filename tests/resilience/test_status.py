"""run_dir/status.json says how every start ended, before anybody else may have the folder; STOP and SAVE that stay."""

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.callbacks.checkpoint import CheckpointCallback
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.lock import LOCK_FILE
from engine.config.phases import plan_job
from engine.config.read import Config, ParallelConfig, resolve
from engine.job import train_job
from engine.parallel.launch import job
from engine.record import Callback, Record
from engine.resilience.signals import SAVE_FILE, STOP_FILE, Wishes, asked_by_file
from engine.resilience.status import FAILED, FINISHED, RUNNING, read_status, write_status
from tests.data.shard_factory import make_shards

STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("shards"), [8])


def config_of(shards: list[str], run_dir: Path, *overrides: str) -> Config:
    """Two phases of two steps."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "embed_dim": 8,
            "vision": {
                "image_size": 12, "patch_size": 6, "depth": 1, "width": 8, "head_width": 4, "mlp_hidden": 16,
            },
            "text": {"context_length": 8, "vocab_size": 49408, "width": 8, "depth": 1, "heads": 2},
        },
        "data": {"shards": shards, "workers": 0},
        "train": {"global_batch_size": 4, "micro_batch_size": 4},
        "optim": {"warmup_steps": 1},
        "checkpoint": {"every_steps": 100},
        "phases": [{"name": "first", "steps": STEPS // 2}, {"name": "second", "steps": STEPS // 2}],
    }  # fmt: skip
    return resolve(tree, list(overrides))


def train(config: Config) -> bool:
    """The job on this rank, with the watch; whether it is done."""
    with Wishes() as wishes, job(ParallelConfig()) as (mesh, device):
        return train_job(plan_job(config), mesh, device, lambda trainer: [CheckpointCallback(trainer)], wishes)


def test_a_start_that_fails_before_its_first_step_says_so(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("watch"):
            raise RuntimeError("can't start new thread")  # as Python says where the user has no process left
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError):
        train(config_of(shards, tmp_path / "run"))
    status = read_status(tmp_path / "run")
    assert (status["outcome"], status["reason"]) == ("failed", "can't start new thread")
    assert (tmp_path / "run" / LOCK_FILE).read_text() == "", "the folder is given back"


def test_a_start_that_cannot_clear_what_a_killed_one_left_says_so(shards: list[str], tmp_path: Path) -> None:
    left = tmp_path / "run" / "checkpoints" / ".saving_step_00000002"
    left.parent.mkdir(parents=True)
    left.touch()
    write_status(tmp_path / "run", FINISHED, step=2)
    with pytest.raises(CheckpointError, match="was left by a killed run and cannot be removed"):
        train(config_of(shards, tmp_path / "run"))
    status = read_status(tmp_path / "run")
    assert status["outcome"] == "failed" and f"{left} was left by a killed run" in status["reason"]
    assert (tmp_path / "run" / LOCK_FILE).read_text() == "", "the folder is given back"


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_without_room_for_another_file_takes_the_status_all_the_same(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    if there:
        write_status(tmp_path, RUNNING, step=2, reason="a reason that is longer than the one that comes after it")
    write_text = Path.write_text

    def full(path: Path, text: str, encoding: str) -> int:
        write_text(path, "", encoding=encoding)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    write_status(tmp_path, FAILED, step=3, reason="short")
    status = read_status(tmp_path)
    assert (status.get("outcome"), status.get("reason")) == (("failed", "short") if there else (None, None))
    assert ("could not be written: No space left on device\n" in capfd.readouterr().err) == (not there)
    assert len(list(tmp_path.iterdir())) == there


def test_the_last_word_is_said_while_the_folder_is_still_held(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start that takes the folder would have its status overwritten; nobody comes in between two phases."""
    run_dir, given_back = tmp_path / "run", list[str]()
    truncate = os.ftruncate

    def truncated(descriptor: int, length: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == LOCK_FILE and os.fstat(descriptor).st_size:
            given_back.append(read_status(run_dir)["outcome"])
        truncate(descriptor, length)

    monkeypatch.setattr(os, "ftruncate", truncated)
    assert train(config_of(shards, run_dir))
    assert given_back == ["finished"]
    assert read_status(run_dir)["step"] == STEPS


def test_a_job_that_was_taken_for_gone_says_nothing_where_another_one_is(shards: list[str], tmp_path: Path) -> None:
    run_dir, other = tmp_path / "run", '{"host": "elsewhere", "pid": 7}'

    class StoodStill(Callback):
        """Another host's job has come meanwhile; its ranks have lost this one."""

        def on_step(self, record: Record) -> None:
            (run_dir / LOCK_FILE).write_text(other)
            write_status(run_dir, RUNNING, step=9, reason="of the other one")
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError), Wishes() as wishes, job(ParallelConfig()) as (mesh, device):
        train_job(plan_job(config_of(shards, run_dir)), mesh, device, lambda trainer: [StoodStill()], wishes)
    assert read_status(run_dir)["reason"] == "of the other one" and (run_dir / LOCK_FILE).read_text() == other


def test_a_lock_that_cannot_be_emptied_says_nothing_about_the_job(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, truncate = tmp_path / "run", os.ftruncate

    def truncated(descriptor: int, length: int) -> None:
        if read_status(run_dir).get("outcome") == "finished":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        truncate(descriptor, length)

    monkeypatch.setattr(os, "ftruncate", truncated)
    assert train(config_of(shards, run_dir))
    assert read_status(run_dir)["outcome"] == "finished"
    monkeypatch.undo()
    assert train(config_of(shards, run_dir)), "the kernel knows that it is free"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with SAVE and STOP in it, of which nothing can be removed, by the superuser neither."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    try:
        if mounted != 0 and os.getuid() == 0:
            pytest.skip("neither a mount nor the mode of a folder makes it read-only here")
        for name in (SAVE_FILE, STOP_FILE):
            (folder / name).touch()
        _let_write(folder, mounted == 0, False)
        yield folder
    finally:
        if mounted == 0:
            subprocess.run(["umount", "-l", folder], check=True)
        else:
            folder.chmod(0o755)


def _let_write(folder: Path, mounted: bool, writable: bool) -> None:
    if mounted:
        subprocess.run(["mount", "-o", f"remount,{'rw' if writable else 'ro'}", folder], check=True)
    else:
        folder.chmod(0o755 if writable else 0o555)


def test_a_wish_that_cannot_be_taken_away_counts_once_and_is_said_once(read_only: Path, capfd) -> None:
    for name, then in ((SAVE_FILE, "every start saves once for it"), (STOP_FILE, "every start stops at it")):
        assert [asked_by_file(read_only, name) for _ in range(3)] == [True, False, False]
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and f"{read_only / name} was heard, but cannot be removed (" in said
        assert said.rstrip().endswith(f"): remove it, {then}")
    assert not asked_by_file(read_only, "OTHER") and not capfd.readouterr().err
    _let_write(read_only, os.path.ismount(read_only), True)
    os.utime(read_only / SAVE_FILE, (1, 1))
    _let_write(read_only, os.path.ismount(read_only), False)
    assert [asked_by_file(read_only, SAVE_FILE) for _ in range(2)] == [True, False], "touched again, it asks again"
    assert not capfd.readouterr().err
    _let_write(read_only, os.path.ismount(read_only), True)
    assert [asked_by_file(read_only, SAVE_FILE) for _ in range(2)] == [True, False], "removed"
    assert not (read_only / SAVE_FILE).exists()
