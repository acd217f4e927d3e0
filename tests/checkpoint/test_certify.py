"""What is kept is good: a state that is not finite is no checkpoint, older ones stay until a step was sound."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.callbacks.checkpoint import CheckpointCallback
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import all_checkpoints, checkpoints_folder, latest_first
from engine.config.read import Config
from engine.parallel.mesh import Mesh
from engine.resilience.judge import UnhealthyStep
from engine.trainer import Trainer
from tests.checkpoint.jobs import alone, build, callback_of, drive, job_config, release, run_steps
from tests.gather import whole_weights


def light(run_dir: Path, *overrides: str) -> Config:
    """A job whose steps are short."""
    small = ("train.micro_batch_size=16", "model.vision.depth=1", "model.text.depth=1")
    return job_config(run_dir, *small, *overrides)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in all_checkpoints(run_dir)]


def break_state(trainer: Trainer, kind: str, value: float, tensor: str = "text.projection.weight") -> None:
    """One element of the optimizer's state, as the last update before a save would leave it."""
    change_state(trainer, kind, value, tensor)
    trainer.training_step.update.at_rest.begin()


def change_state(trainer: Trainer, kind: str, value: float, tensor: str = "text.projection.weight") -> None:
    """One element of the optimizer's state, as memory that forgets would leave it."""
    for tower in trainer.optimizer.held:
        for i, piece in tower.shards.owned():
            if tower.shards.tensors[piece.tensor].name == tensor:
                tower.kinds()[kind][i][piece.start] = value


@pytest.mark.parametrize("kind", ["weight", "moment1", "moment2"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_not_committed(kind: str, value: float, tmp_path, mesh: Mesh, capfd) -> None:
    trainer = build(light(tmp_path, "checkpoint.every_steps=1", "checkpoint.keep_last=1"), mesh)
    drive(trainer, callback := callback_of(trainer), 2)
    callback.saver.wait()
    break_state(trainer, kind, value)
    callback.saver.save(trainer.position, {}, {})
    with pytest.raises(CheckpointError, match=r"step_00000002 was not saved: not finite: rank 0 on .* holds "):
        callback.saver.finish()
    assert "WARNING: step_00000002 was not saved: not finite" in capfd.readouterr().err
    assert "step_00000001" in names(tmp_path) and not list(checkpoints_folder(tmp_path).glob(".*"))
    release(trainer)
    assert build(light(tmp_path), mesh).position.step in (1, 2)


def test_the_checkpoint_before_stays_until_a_step_after_the_new_one_was_sound(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(light(tmp_path, "checkpoint.every_steps=2", "checkpoint.keep_last=1"), mesh)
    drive(trainer, callback := callback_of(trainer), 4)
    callback.saver.wait()
    assert names(tmp_path) == ["step_00000002", "step_00000004"]
    drive(trainer, callback, 1)
    callback.saver.wait()
    assert names(tmp_path) == ["step_00000004"]


FINITE_BUT_WRONG = (200.0, "logit_scale.log_scale")
"""A flipped bit: the scale of the logits is exp(200)."""


def test_a_rewind_goes_past_a_checkpoint_after_which_nothing_was_sound(tmp_path: Path, mesh: Mesh, capfd) -> None:
    settings = ("checkpoint.every_steps=2", "checkpoint.keep_last=1", "health.on_nonfinite=rewind")
    trainer = build(light(tmp_path, *settings), mesh)
    drive(trainer, callback := callback_of(trainer), 2)
    callback.saver.wait()
    good = whole_weights(trainer)
    drive(trainer, callback, 1)
    break_state(trainer, "weight", *FINITE_BUT_WRONG)
    trainer.position.step += 1
    callback.secure({"step": 3, "loss": 1.0})  # saved as it is: every number of it is finite
    run_steps(trainer, 1)
    assert all(value.equal(good[name]) for name, value in whole_weights(trainer).items())
    said = capfd.readouterr().err
    assert (
        "kept as" in said and "step_00000004.suspect" in said and f"; weights of {tmp_path}/checkpoints/step_" in said
    )
    assert names(tmp_path) == ["step_00000002"] and latest_first(tmp_path)[-1].name == "step_00000002"


def test_a_start_from_a_checkpoint_whose_next_step_is_not_sound_is_not_repeated_for_ever(
    tmp_path: Path, mesh: Mesh
) -> None:
    trainer = build(light(tmp_path, "checkpoint.every_steps=2"), mesh)
    drive(trainer, callback := callback_of(trainer), 3)
    break_state(trainer, "weight", *FINITE_BUT_WRONG)
    trainer.position.step += 1
    callback.secure({"step": 3, "loss": 1.0})
    callback.saver.wait()
    release(trainer)
    for expected in (4, 2):
        trainer = build(light(tmp_path, "health.on_nonfinite=stop"), mesh)
        release(trainer)
        assert trainer.position.step == expected
        if expected == 4:
            with pytest.raises(UnhealthyStep):
                run_steps(trainer, 1)
    run_steps(trainer, 1)


def change_a_moment_before_the_save(trainer: Trainer, callback: CheckpointCallback) -> None:
    (loss,) = run_steps(trainer, 1)
    change_state(trainer, "moment2", 0.5)
    callback.secure(record := {"step": trainer.position.step - 1, "loss": loss})
    callback.on_step(record)


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_a_moment_that_changed_before_its_save_is_found_at_the_next_step(
    optimizer: str, tmp_path: Path, mesh: Mesh, capfd
) -> None:
    """No audit is due at that step, which would otherwise certify the checkpoint."""
    settings = ("checkpoint.every_steps=2", "health.audit_every_steps=100", f"optim.name={optimizer}")
    trainer = build(light(tmp_path, *settings), mesh)
    drive(trainer, callback := callback_of(trainer), 3)
    change_a_moment_before_the_save(trainer, callback)
    with pytest.raises(UnhealthyStep, match=r"^step 4: state has changed between two updates: moment2 of rank 0 on "):
        run_steps(trainer, 1)
    assert names(tmp_path) == ["step_00000002"] and "step_00000004.suspect" in capfd.readouterr().err
    callback.on_end({})


def test_the_last_state_of_a_run_is_looked_at_before_it_is_saved(tmp_path: Path, mesh: Mesh) -> None:
    """No update comes after it."""
    trainer = build(light(tmp_path, "checkpoint.every_steps=2", "health.audit_every_steps=100"), mesh)
    drive(trainer, callback := callback_of(trainer), 5)
    with pytest.raises(UnhealthyStep, match=r"^after step 6: state has changed .*: moment2 of rank 0 on .*not saved"):
        change_a_moment_before_the_save(trainer, callback)
    callback.on_end({})
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


EMA = "optim.ema_decay=0.9"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("moment1", ("optim.name=lamb", EMA)),
        ("moment2", ("optim.name=lamb",)),
        ("weight", ("optim.name=lamb",)),
        ("average", ("optim.name=lamb", EMA)),
        ("weight", ("optim.name=adamw",)),
        ("moment1", ("optim.name=adamw", EMA)),
        ("moment2", ("optim.name=adamw", "train.freeze=[vision.*]")),
        ("average", ("optim.name=adamw", EMA)),
        ("moment2", ("optim.name=lamb", "train.precision=bf16")),
        ("weight", ("optim.name=adamw", "train.precision=bf16")),
    ],
)
def test_what_changed_by_itself_is_told_before_the_update_counts(
    kind: str, options: tuple, tmp_path: Path, mesh: Mesh
) -> None:
    """By LAMB before a weight moves; AdamW's one pass moves weights with moments, and nothing follows them."""
    trainer = build(light(tmp_path, "health.audit_every_steps=100", *options), mesh)
    run_steps(trainer, 2)
    assert trainer.audit() == ""
    change_state(trainer, kind, 0.5)
    towers, updates = trainer.optimizer.towers, trainer.optimizer.update_count
    before = [{kind: [flat.clone() for flat in flats] for kind, flats in tower.kinds().items()} for tower in towers]
    with pytest.raises(UnhealthyStep, match=rf"^step 2: state has changed between two updates: {kind} of rank 0 on "):
        run_steps(trainer, 1)
    stay = {"average"} if "optim.name=adamw" in options and kind != "average" else {"average", "weight"}
    for tower, of_tower in zip(towers, before, strict=True):
        for name in stay & of_tower.keys():
            assert all(a.equal(b) for a, b in zip(of_tower[name], tower.kinds()[name], strict=True)), name
    assert trainer.optimizer.update_count == updates
    release(trainer)


def test_a_weight_that_forgot_is_named_where_the_step_is_not_sound_for_it(tmp_path: Path, mesh: Mesh) -> None:
    """No update comes that would look at it: skipping steps would go on until the policy bears no more of them."""
    trainer = build(light(tmp_path, "health.audit_every_steps=100", "health.on_nonfinite=skip"), mesh)
    run_steps(trainer, 2)
    change_state(trainer, "weight", torch.inf)
    with pytest.raises(UnhealthyStep, match=r"^step 2: state has changed between two updates: weight of rank 0 on "):
        run_steps(trainer, 1)
    release(trainer)


@pytest.mark.parametrize("optimizer_name", ["lamb", "adamw"])
def test_a_scale_that_is_clamped_after_an_update_has_not_changed_by_itself(
    optimizer_name: str, tmp_path: Path, mesh: Mesh
) -> None:
    """The update has summed the weights before."""
    trainer = build(light(tmp_path, f"optim.name={optimizer_name}"), mesh)
    at_rest, optimizer = trainer.training_step.update.at_rest, trainer.optimizer
    at_rest.check(update_follows=True)
    assert optimizer.apply(1.0)
    assert all("weight" in tower.sums.left.taken for tower in optimizer.towers if tower.sums.left is not None)
    optimizer.clamp("logit_scale.log_scale", 0.0, 0.001)
    at_rest.begin()
    at_rest.check()
    assert at_rest.changed() == []
    change_state(trainer, "weight", 0.5, "logit_scale.log_scale")
    at_rest.check()
    assert at_rest.changed() == ["weight"]
    release(trainer)


def test_a_frozen_weight_that_changed_is_found_before_a_save_and_after_it(tmp_path: Path, mesh: Mesh) -> None:
    """Nothing writes it, so no update looks at it; at other steps it is not read."""
    settings = ("train.freeze=[text.projection.weight]", "health.audit_every_steps=2", "checkpoint.every_steps=100")
    trainer = build(light(tmp_path, *settings), mesh)
    run_steps(trainer, 3)
    change_state(trainer, "weight", 0.5)
    with pytest.raises(UnhealthyStep, match=r"^step 3: state has changed .*: frozen weight of rank 0 on "):
        run_steps(trainer, 1)
    trainer.audit.at_rest.end()
    run_steps(trainer, 2)  # to the step before a save would come, which looks
    change_state(trainer, "weight", 0.25)
    with pytest.raises(UnhealthyStep, match=r"^step 6: state has changed .*: frozen weight of rank 0 on "):
        run_steps(trainer, 1)
    release(trainer)


def test_a_suspect_that_cannot_be_renamed_is_said_and_not_gone_back_to(
    tmp_path: Path, mesh: Mesh, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("checkpoint.every_steps=2", "health.on_nonfinite=rewind", "health.audit_every_steps=100")
    trainer = build(light(tmp_path, *settings), mesh)
    drive(trainer, callback := callback_of(trainer), 3)
    break_state(trainer, "weight", *FINITE_BUT_WRONG)
    trainer.position.step += 1
    callback.secure({"step": 3, "loss": 1.0})
    callback.saver.wait()
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if str(target).endswith(".suspect"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    run_steps(trainer, 1)
    said = capfd.readouterr().err
    assert "step_00000004 was sound: it could not be renamed (Read-only file system)" in said
    assert "step_00000002, data goes on (1 rewinds" in said
    release(trainer)
