"""State that has changed by itself is told in the step that finds it, and is loaded anew whatever has moved by then."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint.format.folders import all_checkpoints
from engine.optim.adamw import AdamW
from engine.trainer import Trainer
from tests.checkpoint.jobs import BATCH, alone, build, job_config, run_steps, save

SMALL = (
    "train.micro_batch_size=16",
    "model.vision.depth=1",
    "model.text.depth=1",
    "optim.name=adamw",
    "train.steps=20",
)
EMA = "optim.ema_decay=0.9"


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The towers of a test are one block otherwise."""
    monkeypatch.setattr(AdamW, "block_elements", 1 << 10)


def owned(trainer: Trainer) -> list[Tensor]:
    """All that this rank owns, and the weights that are computed with."""
    towers = trainer.optimizer.towers
    state = [flat for tower in towers for flats in tower.kinds().values() for flat in flats]
    return [tensor.clone() for tensor in [*state, *(shard.weight for tower in towers for shard in tower.shards.shards)]]


def flip(trainer: Trainer, kind: str, place: int) -> None:
    """A bit in the first tower: in its last block but one, so many elements behind where that begins."""
    tower = trainer.optimizer.towers[0]
    assert len(tower.blocks()) > 4
    block = tower.blocks()[-2]
    tower.kinds()[kind][block.shard].view(torch.int32)[block.start + place] ^= 1 << 22


@pytest.mark.parametrize("policy", ["repair", "rewind"])
@pytest.mark.parametrize("options", [(), ("train.precision=bf16", "optim.clip_grad_norm=0.05")], ids=["fp32", "bf16"])
def test_a_bit_that_flips_with_adamw_is_never_used(
    policy: str, options: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever moves in its step: state, clock and curve are those of a job that has left these updates out."""
    settings = (*SMALL, EMA, *options, f"health.on_divergence={policy}", "health.audit_every_steps=100")
    flips = [("weight", -1), ("moment1", 0), ("moment2", 700)]
    with alone() as mesh:
        trainer = build(job_config(tmp_path / "flipped", *settings), mesh)
        run_steps(trainer, 2)
        folder = save(trainer)
        saved = owned(trainer)
        for count, (kind, place) in enumerate(flips, 1):
            run_steps(trainer, 1)  # what a checkpoint has given is summed from the next update on
            flip(trainer, kind, place)
            run_steps(trainer, 1)
            said = capfd.readouterr().err
            assert f"state has changed between two updates: {kind} of rank 0 on " in said and str(folder) in said
            assert (trainer.position.rewinds, trainer.position.updates) == (count, 2)
            assert all(a.equal(b) for a, b in zip(owned(trainer), saved, strict=True))
            assert all_checkpoints(tmp_path / "flipped") == [folder]
        found = run_steps(trainer, 2)
        undisturbed = build(job_config(tmp_path / "undisturbed", *settings), mesh)
        run_steps(undisturbed, 2)
        step = undisturbed.position.step = undisturbed.optimizer.step_count = 2 + 2 * len(flips)
        undisturbed.position.samples_seen = step * BATCH
        assert run_steps(undisturbed, 2) == found
        assert all(a.equal(b) for a, b in zip(owned(trainer), owned(undisturbed), strict=True))


@pytest.mark.parametrize(
    "options", [(EMA,), ("train.precision=bf16", EMA), ("train.freeze=[vision.embed.*,text.token_embedding]",)]
)
def test_what_updates_write_has_not_changed_by_itself(options: tuple[str, ...], tmp_path: Path) -> None:
    """The average, a scale that is clamped, weights beside their masters, padding."""
    with alone() as mesh:
        trainer = build(job_config(tmp_path, *SMALL, *options, "optim.lr_other=10"), mesh)
        run_steps(trainer, 6)
        assert trainer.audit() == "" and trainer.optimizer.update_count == 6
