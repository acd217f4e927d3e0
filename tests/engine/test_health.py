"""Unsound steps: skipped, rewound or stopped, on every rank alike, counted and never silent."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import Config, ConfigError, HealthConfig
from engine.health import SOUND, Health, UnhealthyStep
from engine.mesh import build_mesh
from engine.trainer import Trainer
from tests.checkpoint.jobs import BATCH, alone, build, job_config, run_steps, save
from tests.distributed import run_distributed
from tests.gather import whole_weights
from tests.golden import deviations

pytestmark = pytest.mark.dist


# --- the judge --------------------------------------------------------------------------------------------------------


def judge(*steps: tuple[float, float], **settings: Any) -> list[str]:
    health = Health(HealthConfig(**settings))
    return [health.judge(loss, norm).action for loss, norm in steps]


SPIKES = {"on_spike": "rewind", "window_steps": 3}


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("action", ["stop", "skip", "rewind"])
def test_what_is_not_finite(bad: tuple[float, float], action: str) -> None:
    assert judge((1.0, 1.0), bad, (1.0, 1.0), on_nonfinite=action) == ["apply", action, "apply"]


def test_a_spike_is_above_the_median_of_the_last_good_steps() -> None:
    calm = [(1.0, 5.0), (3.0, 1.0), (2.0, 2.0)]  # medians 2 and 2
    assert judge(*calm, (4.1, 1.0), (3.9, 1.0), loss_factor=2.0, **SPIKES)[3:] == ["rewind", "apply"]
    assert judge(*calm, (1.0, 6.1), (9.0, 5.9), gradient_factor=3.0, **SPIKES)[3:] == ["rewind", "apply"]
    # a spike is not a good step: a second one is judged by the same window
    assert judge(*calm, (5.0, 1.0), (5.0, 1.0), loss_factor=2.0, **SPIKES)[3:] == ["rewind", "rewind"]


def test_no_spike_before_the_window_is_full() -> None:
    assert judge((1.0, 1.0), (1.0, 1.0), (90.0, 1.0), loss_factor=2.0, **SPIKES) == ["apply"] * 3


def test_the_problem_names_the_numbers() -> None:
    health = Health(HealthConfig(loss_factor=2.0, **SPIKES))
    for _ in range(3):
        assert health.judge(1.0, 0.5) is SOUND
    assert health.judge(2.5, 0.5).problem == ("loss 2.5, gradient norm 0.5: loss above 2 x the median 1 of 3 steps")


def test_too_many_skips_in_a_row_stop() -> None:
    bad = (math.nan, 1.0)
    actions = judge(bad, bad, (1.0, 1.0), bad, bad, bad, on_nonfinite="skip", max_skips=2)
    assert actions == ["skip", "skip", "apply", "skip", "skip", "stop"]


def test_a_resumed_run_judges_as_the_one_it_continues() -> None:
    settings = HealthConfig(loss_factor=2.0, **SPIKES)
    first, second = Health(settings), Health(settings)
    for _ in range(3):
        first.judge(1.0, 1.0)
    second.load_state_dict(first.state_dict())
    assert second.judge(2.5, 1.0) == first.judge(2.5, 1.0) != SOUND
    assert Health(HealthConfig()).state_dict() == {}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("health.on_nonfinite=ignore", "stop, skip, rewind"),
        ("health.on_spike=skip", "set both"),
        ("health.loss_factor=3", "set both"),
        ("health.loss_factor=0.5", "above 1"),
        ("health.window_steps=0", "window_steps"),
        ("health.max_rewinds=0", "max_rewinds"),
    ],
)
def test_refused(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        job_config("runs/x", override)


def test_a_rewind_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every_steps"):
        job_config("runs/x", "health.on_nonfinite=rewind", "checkpoint.every_steps=0")


# --- the run ----------------------------------------------------------------------------------------------------------

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


def summary(trainer: Trainer, losses: list[float]) -> dict[str, Any]:
    position, optimizer = trainer.position, trainer.optimizer
    return {
        "losses": losses,
        "weights": whole_weights(trainer),
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
    return {"losses": losses, "weights": whole_weights(trainer)}


SCENARIOS = {"skip": skipping, "rewind": rewinding}
LAYOUTS = {
    "dp2": (), "tp2": ("parallel.tensor=2",), "pp2": ("parallel.pipeline=2",),
}  # fmt: skip
EXPECTED = {"skip": [0, 1, 2, 4, 5], "rewind": [0, 1, 4, 5]}
"""Steps whose updates are in the weights at the end."""


def scenario(folder: str, action: str, run: str, *overrides: str) -> Config:
    return job_config(f"{folder}/{run}", f"health.on_nonfinite={action}", "optim.ema_decay=0.9", *overrides)


@pytest.mark.parametrize("action", SCENARIOS)
def test_the_update_is_left_out_and_nothing_else(action: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone() as mesh:
        found = SCENARIOS[action](scenario(str(tmp_path), action, "bad"), mesh)
        warned = capsys.readouterr().err
        expected = without(EXPECTED[action], job_config(tmp_path / "plain", "optim.ema_decay=0.9"), mesh)
    assert found["losses"][-2:] == expected["losses"][-2:]
    assert all(found["weights"][name].equal(value) for name, value in expected["weights"].items())
    assert found["counts"] == [6, 6, *([1, 0] if action == "skip" else [0, 1])]
    updates = len(EXPECTED[action])
    assert found["updates"] == [updates, updates, 6]
    assert f"WARNING: step {BAD_STEP}: loss nan, gradient norm nan: not finite" in warned


def run_layouts(folder: str) -> list[dict[str, Any]]:
    results = []
    for action, run in SCENARIOS.items():
        for name, overrides in LAYOUTS.items():
            config = scenario(folder, action, f"{action}-{name}", *overrides)
            mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, dist.group.WORLD)
            results.append(run(config, mesh))
    return results


def test_every_rank_does_the_same(tmp_path) -> None:
    with alone() as mesh:
        expected = {
            action: run(scenario(str(tmp_path), action, f"{action}-1"), mesh) for action, run in SCENARIOS.items()
        }
    names = [(action, layout) for action in SCENARIOS for layout in LAYOUTS]
    for rank, results in enumerate(run_distributed(run_layouts, 2, folder=str(tmp_path))):
        for (action, layout), found in zip(names, results, strict=True):
            assert found["losses"] == pytest.approx(expected[action]["losses"], rel=1e-5), (action, layout)
            assert (found["counts"], found["updates"]) == (expected[action]["counts"], expected[action]["updates"])
            if rank == 0:
                assert not deviations(found["weights"], expected[action]["weights"], 1e-4), (action, layout)


def test_a_run_that_cannot_go_on_stops_with_its_weights_whole(tmp_path) -> None:
    with alone() as mesh:
        trainer = build(job_config(tmp_path), mesh)
        run_steps(trainer, 1)
        kept = poison(trainer)
        with pytest.raises(UnhealthyStep, match=r"step 1: loss nan.*lower optim.lr_vision"):
            run_steps(trainer, 1)
        heal(trainer, kept)
        assert all(value.isfinite().all() for value in whole_weights(trainer).values())


def test_too_many_rewinds_stop_and_so_does_one_without_a_checkpoint(tmp_path) -> None:
    with alone() as mesh:
        trainer = build(job_config(tmp_path, "health.on_nonfinite=rewind", "health.max_rewinds=1"), mesh)
        poison(trainer)
        with pytest.raises(UnhealthyStep, match="no checkpoint of"):
            run_steps(trainer, 1)
        trainer.lock.release()
        trainer = build(job_config(tmp_path, "health.on_nonfinite=rewind", "health.max_rewinds=1"), mesh)
        run_steps(trainer, 1)
        save(trainer)
        poison(trainer)
        run_steps(trainer, 1)
        poison(trainer)
        with pytest.raises(UnhealthyStep, match="after 1 rewinds"):
            run_steps(trainer, 1)
