"""Unsound steps: skipped, rewound or stopped, on every rank alike, counted and never silent."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.read import Config
from engine.parallel.mesh import build_mesh
from engine.resilience.judge import UnhealthyStep
from engine.trainer import Trainer
from tests.checkpoint.jobs import BATCH, alone, build, job_config, release, run_steps, save
from tests.distributed import run_distributed, world
from tests.gather import whole_weights
from tests.golden import deviations

pytestmark = pytest.mark.dist


BAD_STEP = 3


def poison(trainer: Trainer) -> dict[str, Tensor]:
    """One weight of the text tower becomes NaN, as a broken memory cell would make it; returns what was there."""
    trainer.towers.wait_for_weights()
    kept = {}
    for tensor, parameter in trainer.towers.logical_parameters():
        if tensor.name == "text.projection.weight":
            kept[tensor.name] = parameter.detach().clone()
            parameter.data.view(-1)[0] = torch.nan
    assert kept
    return kept


def heal(trainer: Trainer, kept: dict[str, Tensor]) -> None:
    trainer.towers.wait_for_weights()
    for tensor, parameter in trainer.towers.logical_parameters():
        if tensor.name in kept:
            parameter.data.copy_(kept[tensor.name])


def own_average(trainer: Trainer) -> list[Tensor]:
    return [average.clone() for tower in trainer.optimizer.towers for average in tower.average]


def summary(trainer: Trainer, losses: list[float]) -> dict[str, Any]:
    position, optimizer = trainer.position, trainer.optimizer
    return {
        "losses": losses,
        "weights": whole_weights(trainer),
        "average": own_average(trainer),
        "counts": [position.step, position.samples_seen // BATCH, position.skipped_steps, position.rewinds],
        "updates": [position.updates, optimizer.update_count, optimizer.step_count],
    }


def skipping(config: Config, mesh) -> dict[str, Any]:
    """A step whose weights are poisoned is skipped; the cell is repaired and training goes on."""
    trainer = build(config, mesh)
    losses = run_steps(trainer, BAD_STEP)
    kept = poison(trainer)
    run_steps(trainer, 1)
    heal(trainer, kept)
    return summary(trainer, losses + run_steps(trainer, 2))


def rewinding(config: Config, mesh) -> dict[str, Any]:
    """A checkpoint after step 2; the poisoned step takes everything back to it and goes on with the next data."""
    trainer = build(config, mesh)
    losses = run_steps(trainer, 2)
    save(trainer)
    losses += run_steps(trainer, BAD_STEP - 2)
    poison(trainer)
    run_steps(trainer, 1)
    return summary(trainer, losses + run_steps(trainer, 2))


def without(updates_at: list[int], config: Config, mesh) -> dict[str, Any]:
    """A run that applies the updates of these steps only, at their place in the schedule."""
    trainer = build(config, mesh)
    losses = []
    for step in updates_at:
        trainer.position.step = trainer.optimizer.step_count = step
        trainer.position.samples_seen = step * BATCH
        losses += run_steps(trainer, 1)
    return {"losses": losses, "weights": whole_weights(trainer), "average": own_average(trainer)}


SCENARIOS = {"skip": skipping, "rewind": rewinding}
LAYOUTS = {
    "dp2": (), "tp2": ("parallel.tensor=2",), "pp2": ("parallel.pipeline=2",),
}  # fmt: skip
EXPECTED = {"skip": [0, 1, 2, 4, 5], "rewind": [0, 1, 4, 5]}
"""Steps whose updates are in the weights at the end."""


def unaudited(run_dir: Path | str, *overrides: str) -> Config:
    """A small job without the audit, which would find the cell before the loss is judged."""
    small = ("health.audit_every_steps=0", "train.micro_batch_size=8", "model.vision.depth=2", "model.text.depth=1")
    return job_config(run_dir, *small, *overrides)


def scenario(folder: str, action: str, run: str, *overrides: str) -> Config:
    return unaudited(f"{folder}/{run}", f"health.on_nonfinite={action}", "optim.ema_decay=0.9", *overrides)


@pytest.mark.parametrize("action", SCENARIOS)
def test_the_update_is_left_out_and_nothing_else(action: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone() as mesh:
        found = SCENARIOS[action](scenario(str(tmp_path), action, "bad"), mesh)
        warned = capsys.readouterr().err
        expected = without(EXPECTED[action], unaudited(tmp_path / "plain", "optim.ema_decay=0.9"), mesh)
    assert found["losses"][-2:] == expected["losses"][-2:]
    assert all(found["weights"][name].equal(value) for name, value in expected["weights"].items())
    assert all(one.equal(other) for one, other in zip(found["average"], expected["average"], strict=True))
    assert found["counts"] == [6, 6, *([1, 0] if action == "skip" else [0, 1])]
    updates = len(EXPECTED[action])
    assert found["updates"] == [updates, updates, 6]
    assert f"WARNING: step {BAD_STEP}: loss nan, gradient norm nan: not finite" in warned


def under_way_after_a_stop(config: Config, mesh) -> bool:
    """Whether weights are still being gathered, which the end of the job's groups would cut off."""
    trainer = build(config, mesh)
    poison(trainer)
    with pytest.raises(UnhealthyStep):
        run_steps(trainer, 1)
    return any(group.param_gather_handle for part in trainer.towers.parts for group in part.ddp.bucket_groups)


def run_layouts(folder: str) -> list[Any]:
    results = []
    for action, run in SCENARIOS.items():
        for name, overrides in LAYOUTS.items():
            config = scenario(folder, action, f"{action}-{name}", *overrides)
            mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world())
            results.append(run(config, mesh))
    config = scenario(folder, "stop", "stop-dp2")
    return [*results, under_way_after_a_stop(config, build_mesh(1, 1, world()))]


def test_every_rank_does_the_same(tmp_path) -> None:
    with alone() as mesh:
        expected = {
            action: run(scenario(str(tmp_path), action, f"{action}-1"), mesh) for action, run in SCENARIOS.items()
        }
    names = [(action, layout) for action in SCENARIOS for layout in LAYOUTS]
    for rank, (*results, under_way) in enumerate(run_distributed(run_layouts, 2, folder=str(tmp_path))):
        assert not under_way
        for (action, layout), found in zip(names, results, strict=True):
            assert found["losses"] == pytest.approx(expected[action]["losses"], rel=1e-5), (action, layout)
            assert (found["counts"], found["updates"]) == (expected[action]["counts"], expected[action]["updates"])
            if rank == 0:
                assert not deviations(found["weights"], expected[action]["weights"], 1e-4), (action, layout)


def test_a_run_that_cannot_go_on_stops_with_its_weights_whole(tmp_path) -> None:
    with alone() as mesh:
        trainer = build(unaudited(tmp_path), mesh)
        run_steps(trainer, 1)
        kept = poison(trainer)
        with pytest.raises(UnhealthyStep, match=r"step 1: loss nan.*lower optim.lr_vision"):
            run_steps(trainer, 1)
        heal(trainer, kept)
        assert all(value.isfinite().all() for value in whole_weights(trainer).values())


def test_too_many_rewinds_stop_and_so_does_one_without_a_checkpoint(tmp_path) -> None:
    with alone() as mesh:
        trainer = build(unaudited(tmp_path, "health.on_nonfinite=rewind", "health.max_rewinds=1"), mesh)
        poison(trainer)
        with pytest.raises(UnhealthyStep, match="no checkpoint of"):
            run_steps(trainer, 1)
        release(trainer)
        trainer = build(unaudited(tmp_path, "health.on_nonfinite=rewind", "health.max_rewinds=1"), mesh)
        run_steps(trainer, 1)
        save(trainer)
        poison(trainer)
        run_steps(trainer, 1)
        poison(trainer)
        with pytest.raises(UnhealthyStep, match="after 1 rewinds"):
            run_steps(trainer, 1)


def run_and_save(trainer: Trainer, steps: int) -> Path:
    run_steps(trainer, steps)
    return save(trainer)


def test_a_rewind_goes_to_what_this_run_saved_or_began_with(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not to a later checkpoint of an attempt that was given up, which the folder still holds."""
    rewinds = ("health.on_nonfinite=rewind", "health.max_rewinds=9", "checkpoint.keep_last=9")
    with alone() as mesh:
        given_up = build(unaudited(tmp_path, *rewinds), mesh)
        began, later = run_and_save(given_up, 1), run_and_save(given_up, 2)
        release(given_up)
        trainer = build(unaudited(tmp_path, *rewinds, f"checkpoint.resume={began}"), mesh)

        def said_of_a_rewind() -> str:
            poison(trainer)
            run_steps(trainer, 1)
            return capsys.readouterr().err

        expected = whole_weights(trainer)
        assert later.is_dir() and f"; weights of {began}, " in said_of_a_rewind()
        assert all(value.equal(expected[name]) for name, value in whole_weights(trainer).items())
        first, second = run_and_save(trainer, 2), run_and_save(trainer, 1)
        saver = trainer.recovery.saver
        assert saver is not None
        saver.saved, saver.certified = [first, second], [first, second]  # of one callback, as in a run
        assert f"; weights of {second}, " in said_of_a_rewind()
        (second / "rank_00000.safetensors").unlink()
        said = said_of_a_rewind()
        assert f"; weights of {first}, " in said and f"WARNING: {second} is damaged" in said
        shutil.rmtree(first)  # as retention does
        said = said_of_a_rewind()
        assert f"; weights of {began}, " in said and "damaged" not in said


def test_a_checkpoint_that_gave_a_part_is_nothing_to_rewind_to(tmp_path) -> None:
    """The rest would keep the values that the unsound steps gave it."""
    with alone() as mesh:
        folder = run_and_save(build(unaudited(tmp_path / "first"), mesh), 1)
        settings = (f"checkpoint.resume={folder}", "checkpoint.reinit=[text.projection.weight]")
        trainer = build(unaudited(tmp_path / "second", "health.on_nonfinite=rewind", *settings), mesh)
        poison(trainer)
        with pytest.raises(UnhealthyStep, match=r"to rewind to yet: lower checkpoint\.every_steps 2, or let health"):
            run_steps(trainer, 1)
