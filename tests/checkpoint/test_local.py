"""Checkpoints on the hosts: a host that is lost, damaged bytes, other layouts, folders of others."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from engine.callbacks.checkpoint import CheckpointCallback
from engine.checkpoint.load import training_position
from engine.checkpoint.local import sets
from engine.checkpoint.local.copies import partner_of
from engine.checkpoint.local.sets import local_folder
from engine.checkpoint.resume import choose
from engine.config.errors import ConfigError
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh
from tests.checkpoint.jobs import build, callback_of, drive, job_config, run_steps, world_mesh
from tests.distributed import run_distributed

LOCAL = ("checkpoint.every_steps=4", "checkpoint.local_every_steps=1")


def test_every_copy_is_on_another_host() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    partners = [partner_of(rank, hosts) for rank in range(6)]
    assert partners == [2, 3, 4, 5, 0, 1]
    assert all(partner is not None and hosts[rank] != hosts[partner] for rank, partner in enumerate(partners))
    assert partner_of(1, ["a", "a"]) is None
    assert [partner_of(rank, ["a", "a", "b"]) for rank in range(3)] == [2, 2, 0]


def test_hosts_of_one_name_are_told_apart_by_what_they_see(tmp_path: Path) -> None:
    """Otherwise a node would look for its sets at another one, and none of them would have a copy elsewhere."""
    here, there = (job_config(tmp_path, *LOCAL, f"checkpoint.local_dir={place}") for place in (tmp_path, "/proc"))
    assert sets.host_of(here) == sets.host_of(here) != sets.host_of(there)


def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for wrong, why in (
        ("checkpoint.local_every_steps=2", "fewer than checkpoint.every_steps 2"),
        ("checkpoint.local_dir=/tmp", "no effect without"),
        ("checkpoint.local_dir=here", "a whole path"),
    ):
        with pytest.raises(ConfigError, match=why):
            job_config(tmp_path, wrong)
    with pytest.raises(ConfigError, match="go on by themselves"):
        job_config(tmp_path, *LOCAL, "checkpoint.resume=none")


def _lose_a_host(folder: str) -> dict[str, list]:
    """Two ranks on two hosts, as far as the code can tell: each has a folder and a name of its own."""
    root = Path(folder)
    rank = int(os.environ["RANK"])
    sets.host_name = lambda: f"host{rank}"
    config = job_config(root / "run", *LOCAL, f"checkpoint.local_dir={root / f'disk{rank}'}")
    (root / f"disk{rank}").mkdir()
    mesh, own = world_mesh(config), local_folder(config)
    trainer = build(config, mesh)
    callback = callback_of(trainer)
    drive(trainer, callback, 3)
    assert callback.local is not None
    callback.local.wait()
    kept = sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file())
    wanted = run_steps(trainer, 3)
    trainer._release_run()

    def again(*overrides: str) -> tuple[int, list[float]]:
        everyone(None, mesh.control)
        second = build(
            job_config(root / "run", *LOCAL, f"checkpoint.local_dir={root / f'disk{rank}'}", *overrides), mesh
        )
        step, losses = second.position.step, run_steps(second, 6 - second.position.step)
        second._release_run()
        return step, losses

    if rank == 1:
        shutil.rmtree(own)  # a new host has nothing
    lost = again()
    cut_otherwise = again("parallel.virtual=5")  # the new host has no more than its own rank's file
    if rank == 0:
        file = next(own.glob("step_00000003*/rank_00000.safetensors"))
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\xff")
    damaged = again()
    return {
        "kept": kept, "wanted": wanted, "lost": [lost[0], lost[1]], "damaged": [damaged[0], len(damaged[1])],
        "cut otherwise": [cut_otherwise[0], len(cut_otherwise[1])],
    }  # fmt: skip


@pytest.mark.dist
def test_a_run_goes_on_when_one_of_two_hosts_is_lost(tmp_path: Path) -> None:
    ranks = run_distributed(_lose_a_host, 2, folder=str(tmp_path))
    both = [f"rank_{rank:05d}.{end}" for rank in (0, 1) for end in ("json", "safetensors")]
    for found in ranks:
        sets = {name.split("/")[0] for name in found["kept"]}
        assert sets == {"step_00000003.t1p1d2"}, "older sets go"
        assert [name.split("/", 1)[1] for name in found["kept"]] == ["head/manifest.json", *both]
        assert found["lost"] == [3, found["wanted"]]
        assert found["cut otherwise"] == [0, 6]
        assert found["damaged"] == [0, 6]  # the run folder holds none yet


def _older_and_other_sets(folder: str, mesh: Mesh) -> dict[str, object]:
    """Where starts begin beside sets after 3 and 5 steps and checkpoints after 2 and 4, and what they say."""
    config = job_config(Path(folder) / "run", *LOCAL, "checkpoint.every_steps=2", f"checkpoint.local_dir={folder}")
    trainer = build(config, mesh)
    callback, own, run = callback_of(trainer), local_folder(config), Path(config.run_dir)
    drive(trainer, callback, 3)
    assert callback.local is not None
    callback.local.wait()
    shutil.copytree(own / "step_00000003.t1p1d1", own.parent / "kept")
    drive(trainer, callback, 2)
    callback.local.wait()
    trainer._release_run()
    latest = run / "checkpoints" / "latest"

    def begins() -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            checkpoint = choose(config, mesh)
        return training_position(checkpoint).step if checkpoint else 0, said.getvalue()

    found: dict[str, object] = {"newest": begins()[0]}
    latest.write_text("step_00000002")
    found["gone back"] = begins()[0]
    latest.write_text("step_00000004")
    (own / "step_00000005.t1p1d1").rename(own / "step_00000005.t1p1d2")
    found["other layout"] = begins()
    (own.parent / "kept").rename(own / "step_00000003.t1p1d1")
    with (run / "checkpoints" / "step_00000004" / "rank_00000.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    found["newest damaged"] = begins()
    shutil.rmtree(own)  # somebody clears the hosts' memory: a set is lost, and no more
    drive(trainer, callback, 2)  # a checkpoint and a set
    callback.local.wait()
    found["made anew"] = [path.name for path in own.iterdir()]
    return found


def _one_rank(folder: str) -> dict[str, object]:
    config = job_config(Path(folder) / "run", *LOCAL, f"checkpoint.local_dir={folder}")
    mesh = world_mesh(config)
    trainer = build(config, mesh)
    callback = callback_of(trainer)
    drive(trainer, callback, 2)
    assert callback.local is not None
    callback.local.wait()
    own = local_folder(config)
    held = sets.held_sets(own, mesh)
    with torch.no_grad():
        trainer.optimizer.towers[0].master[0][0] = float("nan")
    trainer.position.step = 3
    callback.secure({"step": 2, "loss": 1.0})
    trainer._release_run()
    callback.local.wait()
    second = build(config, mesh)
    step, began = second.position.step, str(second.recovery.began)
    CheckpointCallback(second).open_local()
    assert second.recovery.local is not None
    second.recovery.local.forget()
    second._release_run()
    more = _older_and_other_sets(f"{folder}/more", mesh)
    top = own.parent
    top.chmod(0o777)
    return more | {
        "held": json.dumps(held), "step": step, "began": began, "left": [path.name for path in own.iterdir()],
        "refused": sets.make_own(own), "mode": 0,
    }  # fmt: skip


@pytest.mark.dist
def test_what_is_not_finite_is_no_set_and_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (found,) = run_distributed(_one_rank, 1, folder=str(tmp_path))
    assert json.loads(found["held"]) == {"2": ["rank_00000", "head"]}
    assert (found["step"], found["began"], found["left"]) == (2, "None", [])
    assert "is not a folder that only this user can write" in found["refused"]
    assert (found["newest"], found["gone back"]) == (5, 2)
    assert found["made anew"] == ["step_00000007.t1p1d1"]
    step, said = found["other layout"]
    assert step == 4 and "WARNING: the hosts hold step_00000005 of layout t1p1d2, which a start at t1p1d1" in said
    step, said = found["newest damaged"]
    assert step == 3 and "step_00000004 is damaged and was not used" in said and "step_00000003.t1p1d1 is newer" in said
