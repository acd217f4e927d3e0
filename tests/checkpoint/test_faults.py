"""Whatever happens to a run or its files: a whole checkpoint stays, damage is named, nothing is used silently."""

import errno
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.checkpoint.format.disk import write_synced
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import (
    Retention,
    all_checkpoints,
    checkpoints_folder,
    clear_leftovers,
    latest_first,
    pointed_at,
    prune,
    put_in_place,
    saving_folder,
    step_folder,
)
from engine.checkpoint.format.lock import LOCK_FILE, RunLock
from engine.checkpoint.format.machine import machine_of
from engine.checkpoint.format.manifest import RECORD
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.resume import newest_good
from engine.parallel.mesh import Mesh
from engine.resilience.roll_call import RollCall
from engine.resilience.signals import STOP_FILE
from tests.checkpoint.children import (
    child,
    hear,
    hold_lock,
    hold_lock_and_look_often,
    save_for_ever,
    save_with_file_limit,
)
from tests.checkpoint.jobs import alone, build, callback_of, drive, job_config, release, run_steps, save


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def good_run(module_path: Path, mesh: Mesh) -> Path:
    """A run with checkpoints after steps 1 and 2."""
    run_dir = module_path / "good"
    trainer = build(job_config(run_dir), mesh)
    for _ in range(2):
        run_steps(trainer, 1)
        save(trainer)
    release(trainer)
    return run_dir


@pytest.fixture
def run_dir(good_run: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return shutil.copytree(good_run, tmp_path / "run")


# --- killed while saving ---------------------------------------------------------------------------------------------


def _kill_while_saving(run_dir: Path, times: int) -> int:
    """Kill at random moments, every other one from the beginning of a save, and resume.

    Returns how often a half-written checkpoint was left.
    """
    draw, left_half, last_step = random.Random(0), 0, 0
    for attempt in range(times):
        before = _half_written(run_dir)
        with child(save_for_ever, run_dir) as (process, pipe):
            resumed = hear(pipe)
            assert resumed >= last_step, f"attempt {attempt} resumed at step {resumed}, step {last_step} had been saved"
            while attempt % 2 and process.is_alive() and _half_written(run_dir) <= before:
                process.join(0.001)  # a machine with other work may need a second for a step
            process.join(draw.uniform(0.0, 0.01 if attempt % 2 else 0.3))
            assert process.is_alive(), "the child ended by itself"
        left_half += not _half_written(run_dir) <= before
        latest = Checkpoint(latest_first(run_dir)[0])
        latest.verify()
        assert latest.manifest.position is not None
        last_step = latest.manifest.position.step
    return left_half


def _half_written(run_dir: Path) -> set[tuple[str, int]]:
    """Name and last change of the checkpoints that are being written, or were when their writer died."""
    found = set()
    for folder in checkpoints_folder(run_dir).glob(".saving_*"):
        with suppress(FileNotFoundError):  # it is whole by now
            found.add((folder.name, folder.stat().st_mtime_ns))
    return found


def test_a_killed_save_leaves_a_loadable_latest(tmp_path: Path) -> None:
    _kill_while_saving(tmp_path, 4)


@pytest.mark.slow
def test_fifty_killed_saves_leave_a_loadable_latest(tmp_path: Path) -> None:
    assert _kill_while_saving(tmp_path, 50) > 5


# --- damaged files ---------------------------------------------------------------------------------------------------


def _flip(folder: Path) -> str:
    file = folder / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "rank_00000.safetensors has another sha256"


def _cut(folder: Path) -> str:
    file = folder / "rank_00000.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    return "rank_00000.safetensors has .* bytes, the manifest says"


def _remove(folder: Path) -> str:
    (folder / "rank_00000.safetensors").unlink()
    return "rank_00000.safetensors is missing"


def _no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return r"it has no manifest\.json"


def _cut_manifest(folder: Path) -> str:
    file = folder / "manifest.json"
    os.truncate(file, file.stat().st_size // 2)
    return "cannot be read or is cut short"


def _altered_manifest(folder: Path) -> str:
    file = folder / "manifest.json"
    text = file.read_text()
    assert '"samples_seen": 32' in text
    file.write_text(text.replace('"samples_seen": 32', '"samples_seen": 33'))
    return "was altered"


def _gone(folder: Path) -> str:
    shutil.rmtree(folder)
    return "is not a checkpoint"


DAMAGES = [_flip, _cut, _remove, _no_manifest, _cut_manifest, _altered_manifest, _gone]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_last_good_one_used(damage, run_dir: Path, mesh: Mesh, capfd) -> None:
    older, newest = all_checkpoints(run_dir)
    reason = damage(newest)
    trainer = build(job_config(run_dir), mesh)
    said = capfd.readouterr().err
    assert trainer.position.step == 1
    assert (
        f"WARNING: {newest} is damaged and was not used" in said
        and f"falling back to the last good checkpoint, {older}" in said
    )
    assert re.search(reason, said)
    # The next save takes the place; what was damaged is kept aside for a person.
    run_steps(trainer, 1)
    Checkpoint(save(trainer)).verify()
    assert damage is _gone or newest.with_name(newest.name + ".damaged").is_dir()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_that_is_asked_for_is_refused(damage, run_dir: Path, mesh: Mesh, tmp_path: Path) -> None:
    newest = all_checkpoints(run_dir)[-1]
    reason = damage(newest)
    with pytest.raises(CheckpointError) as caught:
        build(job_config(tmp_path / "other", f"checkpoint.resume={newest}"), mesh)
    assert re.search(reason, str(caught.value)) or "neither a checkpoint" in str(caught.value)


def test_a_run_without_any_good_checkpoint_does_not_start_afresh(run_dir: Path, mesh: Mesh) -> None:
    for folder in all_checkpoints(run_dir):
        _flip(folder)
    for _ in range(2):  # nor at the second try
        with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole"):
            build(job_config(run_dir), mesh)


# --- disks and folders -----------------------------------------------------------------------------------------------


def test_a_writer_that_fails_stops_the_run_at_the_next_step_and_the_last_checkpoint_stays(
    tmp_path: Path, mesh: Mesh
) -> None:
    with child(save_with_file_limit, tmp_path, 20_000) as (_, pipe):
        assert hear(pipe) == "training on"
        said = hear(pipe)
    assert "File too large" in said and "rank_00000.safetensors failed after" in said
    (left,) = all_checkpoints(tmp_path)
    Checkpoint(left).verify()
    assert not list(checkpoints_folder(tmp_path).glob(".saving_*/rank_*.safetensors")), "a full disk was left full"
    assert build(job_config(tmp_path), mesh).position.step == 1


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; skips the test where mounting is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, mesh: Mesh) -> None:
    with tmpfs(tmp_path / "disk", "size=60m") as disk:
        trainer = build(job_config(disk / "run"), mesh)
        with pytest.raises(CheckpointError, match="free some space") as said:
            save(trainer)
        needs = re.search(r"needs (\S+) GB beside (\S+) GB kept in reserve, and (\S+) GB are free:", str(said.value))
        assert needs is not None
        needed, reserve, free = map(float, needs.groups())
        assert needed + reserve > free > needed, "the reserve is what is missing"
        assert not list(checkpoints_folder(disk / "run").iterdir())
        release(trainer)


@pytest.mark.parametrize("policy", ["skip", "wait"])
def test_a_disk_without_room_need_not_end_the_run(
    policy: str, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:

        def make_room(seconds: float) -> None:
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)

        settings = (f"checkpoint.on_full={policy}", "checkpoint.every_steps=1")
        trainer = build(job_config(disk / "run", *settings), mesh)
        callback = callback_of(trainer)
        if policy == "wait":
            monkeypatch.setattr("engine.checkpoint.save.time", SimpleNamespace(sleep=make_room))
        drive(trainer, callback, 1)
        callback.saver.wait()
        assert bool(all_checkpoints(disk / "run")) == (policy == "wait")
        make_room(0)
        drive(trainer, callback, 1)
        callback.saver.wait()
        assert all_checkpoints(disk / "run")[-1].name == "step_00000002"
        said = capfd.readouterr().err
        then = "training waits for room" if policy == "wait" else "training goes on"
        assert said.count("GB are free: free some space") == said.count(f"; {then}") == 1
        release(trainer)


@pytest.mark.parametrize("last", [False, True])
def test_a_stop_ends_the_wait_for_room_and_says_what_is_lost(
    last: bool, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    with tmpfs(tmp_path / "disk", "size=200m") as disk:
        run_dir, looks = disk / "run", list[float]()
        settings = ("checkpoint.on_full=wait", "checkpoint.every_steps=1", f"train.steps={2 if last else 3}")
        trainer = build(job_config(run_dir, *settings), mesh)
        trainer._roll_call = roll_call = RollCall(run_dir, mesh, None)
        callback = callback_of(trainer)
        drive(trainer, callback, 1)
        callback.saver.wait()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)

        def look_again(seconds: float) -> None:
            looks.append(trainer.pulse.since_s)
            if len(looks) == 3:
                (run_dir / STOP_FILE).touch()

        monkeypatch.setattr("engine.checkpoint.save.time", SimpleNamespace(sleep=look_again))
        drive(trainer, callback, 1)
        assert len(looks) == 3 and looks == sorted(set(looks)), "the watch sees that it lives"
        orders, _ = roll_call(None)
        assert orders.stop == str(run_dir / STOP_FILE)
        if last:
            assert trainer.stopped == orders.stop
        else:
            callback.save_now({"step": 1, "loss": 1.0}, orders.stop)
        said = capfd.readouterr().err
        assert said.count("GB are free: free some space") == said.count("; training waits for room") == 1
        line = f"stopped by {run_dir / STOP_FILE} after step 2: not saved; the last checkpoint is step_00000001"
        assert line in said.splitlines()
        assert trainer.unsaved == "the state after step 2 was not saved, the last checkpoint is step_00000001"
        assert [folder.name for folder in all_checkpoints(run_dir)] == ["step_00000001"]
        release(trainer)


def test_the_state_after_the_last_step_is_not_skipped(tmp_path: Path, mesh: Mesh) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        settings = ("checkpoint.on_full=skip", "checkpoint.every_steps=1", "train.steps=1")
        trainer = build(job_config(disk / "run", *settings), mesh)
        with pytest.raises(CheckpointError, match="after the last step, 1, was not saved, there is no checkpoint yet"):
            drive(trainer, callback_of(trainer), 1)
        release(trainer)


def test_a_full_disk_fails_the_save_and_is_named(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "engine.checkpoint.save._MARGIN_BYTES", -(10**9)
    )  # somebody else fills the disk after the check
    with tmpfs(tmp_path / "disk", "size=256k") as disk:
        trainer = build(job_config(disk / "run"), mesh)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(trainer)
        assert not all_checkpoints(disk / "run")
        release(trainer)


@pytest.mark.parametrize("under_way", [False, True])
def test_a_stop_whose_save_fails_does_not_say_that_it_was_saved(
    under_way: bool, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr("engine.checkpoint.save._MARGIN_BYTES", -(10**9))
    with tmpfs(tmp_path / "disk", "size=256k") as disk:
        settings = ("checkpoint.on_full=skip", f"checkpoint.every_steps={1 if under_way else 100}")
        trainer = build(job_config(disk / "run", *settings), mesh)
        callback = callback_of(trainer)
        drive(trainer, callback, 1)
        callback.save_now({"step": 0, "loss": 1.0}, "SIGTERM")
        said = capfd.readouterr().err
        assert "No space left on device" in said and "stopped by SIGTERM after step 1: not saved" in said
        assert callback.saver.saved == [] and not all_checkpoints(disk / "run")
        release(trainer)


def test_a_checkpoint_whose_record_alone_fails_is_one(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.name == RECORD:  # what is written behind the commit
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_synced(path, content)

    monkeypatch.setattr("engine.checkpoint.save.write_synced", full)
    trainer = build(job_config(tmp_path / "run", "checkpoint.on_full=skip", "checkpoint.every_steps=1"), mesh)
    callback = callback_of(trainer)
    drive(trainer, callback, 1)
    callback.save_now({"step": 0, "loss": 1.0}, "SIGTERM")
    said = capfd.readouterr().err
    assert "No space left on device" in said and "stopped by SIGTERM after step 1: saved in " in said
    assert callback.saver.saved == all_checkpoints(tmp_path / "run") != []
    release(trainer)


def test_a_read_only_folder_is_refused_at_the_start(tmp_path: Path, mesh: Mesh) -> None:
    with (
        tmpfs(tmp_path / "disk", "ro,size=1m") as disk,
        pytest.raises(CheckpointError, match=r"run_dir .* cannot be written: Read-only file system"),
    ):
        build(job_config(disk / "run"), mesh)


# --- two jobs --------------------------------------------------------------------------------------------------------


def test_a_second_job_on_the_folder_is_refused_until_the_first_is_gone(tmp_path: Path, mesh: Mesh) -> None:
    with child(hold_lock, tmp_path) as (process, pipe):
        assert hear(pipe) == "locked"
        with pytest.raises(CheckpointError, match=f"in use by process {process.pid} on "):
            build(job_config(tmp_path), mesh)
        process.kill()
        process.join()
        release(build(job_config(tmp_path), mesh))


def test_a_folder_left_on_another_machine_is_watched_then_taken_whatever_the_clocks_say(tmp_path: Path, capfd) -> None:
    mark = tmp_path / LOCK_FILE
    for touched_s in (1, 2**33):  # long ago, and in the future of this machine's clock
        mark.write_text('{"host": "elsewhere", "pid": 7}')
        os.utime(mark, (touched_s, touched_s))
        RunLock(tmp_path, patience_s=0.05).release()
        assert "was left by process 7 on elsewhere" in capfd.readouterr().err
    assert mark.read_text() == ""


def test_a_name_alone_is_not_a_machine(tmp_path: Path, capfd) -> None:
    """Two hosts may both be called localhost, two containers as their recipe says; who boots again is another one."""
    held = RunLock(tmp_path)
    left = json.loads((tmp_path / LOCK_FILE).read_text())
    held.release()
    for changes in ({"machine": left["machine"].replace("-", "0", 1)}, {"machine": None}):
        again = tmp_path / f"again{changes['machine'] is None}"
        again.mkdir()
        (again / LOCK_FILE).write_text(json.dumps(left | changes))
        RunLock(again, patience_s=0.05).release()
        said = capfd.readouterr().err
        who = f"process {os.getpid()} on {socket.gethostname()} (before it booted, or another machine or container of"
        assert f"was left by {who} this name)" in said
    (again / LOCK_FILE).write_text(json.dumps(left))
    RunLock(again, patience_s=3600).release()
    assert not capfd.readouterr().err, "the kernel knows that nobody holds it"


def test_containers_of_one_node_are_one_machine_where_they_see_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    assert machine_of(tmp_path) == machine_of(tmp_path / "below") != machine_of(Path("/proc"))
    assert machine_of(Path("/proc")) != machine_of(tmp_path / "gone")


def test_a_job_of_another_machine_that_lives_is_not_disturbed(tmp_path: Path) -> None:
    mark, ended = tmp_path / LOCK_FILE, threading.Event()
    mark.write_text('{"host": "elsewhere", "pid": 7}')

    def live() -> None:
        touched = 0
        while not ended.wait(0.01):
            touched += 1
            os.utime(mark, (touched, touched))

    alive = threading.Thread(target=live)
    alive.start()
    try:
        with pytest.raises(CheckpointError, match=r"in use by process 7 on elsewhere, which touched .*run\.lock"):
            RunLock(tmp_path, patience_s=30)
    finally:
        ended.set()
        alive.join()


def test_a_holder_that_was_taken_for_gone_ends_and_leaves_the_folder_to_the_next_one(tmp_path: Path) -> None:
    """A host that was stopped, or cut off from its files, for longer than it is watched."""
    mark, other = tmp_path / LOCK_FILE, '{"host": "elsewhere", "pid": 7}'
    held = RunLock(tmp_path)
    assert held.taken_by() == ""
    mark.write_text(other)
    assert held.taken_by() == "process 7 on elsewhere"
    held.release()
    assert mark.read_text() == other
    with child(hold_lock_and_look_often, tmp_path / "run") as (process, pipe):
        assert hear(pipe) == "locked"
        (tmp_path / "run" / LOCK_FILE).write_text(other)
        process.join()
        assert process.exitcode == 1
        assert "was taken by process 7 on elsewhere while this process stood still" in hear(pipe)
    assert (tmp_path / "run" / LOCK_FILE).read_text() == other


def test_a_second_lock_of_the_same_process_is_no_stranger(tmp_path: Path) -> None:
    """A process that never gave its folder back, and takes it again, does not end; nor does one that gave it back."""
    kept = RunLock(tmp_path)
    again = RunLock(tmp_path)
    assert (kept.taken_by(), again.taken_by()) == ("", "")
    again.release()
    other = tmp_path / "other"
    other.write_text('{"host": "elsewhere", "pid": 7}')
    with other.open() as file:  # whatever number it has: that of the lock that was given back is free
        assert again.taken_by() == "", file
    kept.release()


def test_a_lock_that_somebody_removes_while_it_is_watched_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / LOCK_FILE
    mark.write_text('{"host": "elsewhere", "pid": 7}')
    said = io.StringIO()
    monkeypatch.setattr(said, "flush", lambda: mark.unlink(missing_ok=True))  # it says that it watches
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(CheckpointError, match=r"run\.lock was removed while its holder was watched: start again"):
        RunLock(tmp_path, patience_s=30)


def test_a_job_that_its_scheduler_starts_again_elsewhere_takes_its_folder_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    (tmp_path / LOCK_FILE).write_text('{"host": "elsewhere", "pid": 7, "job": "slurm 4711"}')
    RunLock(tmp_path, patience_s=3600).release()
    assert not capfd.readouterr().err


# --- latest is a hint ------------------------------------------------------------------------------------------------


STRANGE = [b"", b"/etc", b"../..", b".", b"step_00000002/..", b"\xff\xfe\x00", b"step_2", b"step_00000001 2"]


@pytest.mark.parametrize("content", STRANGE)
def test_a_pointer_that_names_no_checkpoint_is_passed_over_and_nothing_is_renamed(
    content: bytes, run_dir: Path, mesh: Mesh, capfd
) -> None:
    (checkpoints_folder(run_dir) / "latest").write_bytes(content)
    before = sorted(run_dir.parent.rglob("*"))
    trainer = build(job_config(run_dir), mesh)
    release(trainer)
    assert trainer.position.step == 2
    assert "does not hold the name of a checkpoint" in capfd.readouterr().err
    assert sorted(run_dir.parent.rglob("*")) == before


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_begin_at_0(run_dir: Path, mesh: Mesh) -> None:
    (checkpoints_folder(run_dir) / "latest").unlink()
    for folder in all_checkpoints(run_dir):
        folder.rename(folder.with_name(f"{folder.name}.damaged"))
    with pytest.raises(CheckpointError, match=r"nothing but checkpoints that were set aside .*step_00000001\.damaged"):
        build(job_config(run_dir), mesh)
    trainer = build(job_config(run_dir, "checkpoint.resume=none"), mesh)
    release(trainer)
    assert trainer.position.step == 0


def test_a_rolled_back_run_does_not_count_the_attempt_that_was_given_up(run_dir: Path, mesh: Mesh, capfd) -> None:
    pointer, older = checkpoints_folder(run_dir) / "latest", all_checkpoints(run_dir)[-1]
    given_up = build(job_config(run_dir), mesh)
    run_steps(given_up, 4)
    later = save(given_up)
    release(given_up)
    pointer.write_text(older.name)
    trainer = build(job_config(run_dir), mesh)
    assert trainer.position.step == 2
    run_steps(trainer, 1)
    newest = save(trainer)
    release(trainer)
    assert f"{later.name}.abandoned: of an attempt" in capfd.readouterr().err
    assert all_checkpoints(run_dir)[-1] == newest and later.with_name(f"{later.name}.abandoned").is_dir()


def test_what_follows_a_lost_checkpoint_is_older_not_of_an_attempt_that_was_given_up(run_dir: Path) -> None:
    one, two = all_checkpoints(run_dir)
    given_up = shutil.copytree(two, two.with_name("step_00000009"))
    (checkpoints_folder(run_dir) / "latest").write_text(two.name)
    assert latest_first(run_dir) == [two, one, given_up]


@pytest.mark.parametrize(
    ("given_up", "done", "in_place"),
    [(False, 0, False), (False, 1, True), (False, 2, True), (True, 0, False), (True, 1, False), (True, 2, True)],
)
def test_a_run_killed_while_a_checkpoint_takes_its_place_has_not_gone_back(
    given_up: bool, done: int, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """done: renames before the end. given_up: the run went back from an attempt that has a checkpoint of this step."""
    one, two = (step_folder(tmp_path, step) for step in (1, 2))
    there = {one: "1", saving_folder(two): "new", **({two: "given up"} if given_up else {})}
    for folder, content in there.items():
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(content)
    (one.parent / "latest").write_text(one.name)
    left = iter(range(done))

    def killed(rename: Callable[[Path, Path], None], old: Path, new: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        for name in ("rename", "replace"):
            patch.setattr(os, name, partial(killed, getattr(os, name)))
        put_in_place(two)
    clear_leftovers(tmp_path)
    assert pointed_at(tmp_path) == (two if in_place else one)
    assert two.is_dir() == (in_place or given_up)
    assert not two.is_dir() or (two / "manifest.json").read_text() == ("new" if in_place else "given up")
    assert not list(one.parent.glob(".*")) and not (one.parent / "latest.new").exists()


@pytest.mark.parametrize("why", ["damaged", "suspect", "abandoned"])
def test_a_run_whose_checkpoints_are_all_set_aside_does_not_begin_at_0(why: str, tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "checkpoints" / f"step_00000002.{why}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"nothing but checkpoints that were set aside \(.*2\.{why}\)"):
        newest_good(tmp_path, job_config(tmp_path), mesh)


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, where what somebody reads cannot go."""
    for step in (1, 2, 3):
        folder = step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        prune(tmp_path, Retention(last=2))
        assert clear_leftovers(tmp_path) == []
    assert (
        "step_00000001 is no longer kept and could not be deleted whole: Directory not empty" in capfd.readouterr().err
    )
    assert [folder.name for folder in all_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    clear_leftovers(tmp_path)
    assert not list(checkpoints_folder(tmp_path).glob(".*"))
