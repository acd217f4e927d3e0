"""The moving average of the weights: its formula, the same at every layout, in checkpoints, and in the tools."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.checkpoint.reader import Checkpoint
from engine.config.read import ConfigError
from engine.evaluation.embedder import load_encoders
from engine.optim.average import averaged_weights
from engine.parallel.mesh import build_mesh
from tests.checkpoint.jobs import alone, build, job_config, run_steps, save
from tests.distributed import run_distributed, world
from tests.gather import whole_weights
from tests.golden import deviations
from tools.convert.__main__ import main as convert

pytestmark = pytest.mark.dist

DECAY, STEPS = 0.75, 4
EMA = f"optim.ema_decay={DECAY}"


def stored(folder: Path, kind: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read_whole(name, kind) for name in checkpoint.manifest.shapes(kind)}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint after four steps on one rank, and the average by the formula."""
    with alone() as mesh:
        trainer = build(job_config(tmp_path_factory.mktemp("alone"), EMA), mesh)
        expected = whole_weights(trainer)
        for _ in range(STEPS):
            run_steps(trainer, 1)
            weights = whole_weights(trainer)
            expected = {name: DECAY * a + (1 - DECAY) * weights[name] for name, a in expected.items()}
        return save(trainer), expected


def test_the_formula(averaged: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = averaged
    assert not deviations(stored(folder, AVERAGE), expected, 1e-6)
    assert deviations(stored(folder, WEIGHT), expected, 1e-3)


OTHERWISE = (
    "train.precision=bf16",
    "checkpoint.accept=[train.precision]",
    "parallel.shard=weights",
    "parallel.virtual=2",
)
LAYOUTS = [("parallel.tensor=2",), ("parallel.pipeline=2",), OTHERWISE]
"""Each hands its checkpoint to the next; the last is DP 2."""


def hand_on(folder: str) -> list[float]:
    """Two steps at each of two layouts; then what bf16 weights look like inside the average. Digest of that."""
    path, result = "none", []
    for step, overrides in enumerate(LAYOUTS[:2], start=1):
        config = job_config(f"{folder}/{step}", EMA, f"checkpoint.resume={path}", *overrides)
        trainer = build(config, build_mesh(config.parallel.tensor, config.parallel.pipeline, world()))
        run_steps(trainer, 2)
        path = str(save(trainer))
    config = job_config(f"{folder}/3", EMA, f"checkpoint.resume={path}", *LAYOUTS[2])
    trainer = build(config, build_mesh(1, 1, world()))
    before = whole_weights(trainer)
    with averaged_weights(trainer.optimizer, trainer.towers):
        inside = whole_weights(trainer)
    after = whole_weights(trainer)
    if trainer.mesh.world.rank == 0:
        average = stored(Path(path), AVERAGE)
        result = [
            float(
                max(
                    (inside[name] - average[name].bfloat16().float()).abs().max()
                    for name in inside
                    if "log" not in name
                )
            ),
            float(all(after[name].equal(before[name]) for name in before)),
        ]
    return result


def test_the_same_at_every_layout_and_over_a_resume(averaged: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    largest, restored = run_distributed(hand_on, 2, folder=str(tmp_path))[0]
    assert (largest, restored) == (0.0, 1.0)
    found = stored(tmp_path / "2" / "checkpoints" / "step_00000004", AVERAGE)
    assert not deviations(found, averaged[1], 1e-4)


def test_an_average_that_is_switched_on_begins_with_the_weights(tmp_path: Path) -> None:
    with alone() as mesh:
        trainer = build(job_config(tmp_path / "off"), mesh)
        run_steps(trainer, 2)
        path = save(trainer)
        assert not Checkpoint(path).manifest.shapes(AVERAGE)
        trainer = build(job_config(tmp_path / "on", EMA, f"checkpoint.resume={path}"), mesh)
        assert all(
            a.equal(m) for tower in trainer.optimizer.towers for a, m in zip(tower.average, tower.master, strict=True)
        )


def test_inference_takes_the_average(averaged: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = averaged
    with alone() as mesh:
        config = job_config("runs/x")
        encoders, _ = load_encoders(Checkpoint(folder), config, mesh, torch.device("cpu"), kind=AVERAGE)
    assert encoders.text is not None
    torch.testing.assert_close(encoders.text.state_dict()["projection.weight"], expected["text.projection.weight"])


def export(folder: Path, out: Path, *more: str) -> Any:
    return convert(["--to", "tower", "--tower", "vision", "--checkpoint", str(folder), "--out", str(out), *more])


def test_convert_writes_the_average(averaged: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, expected = averaged
    assert export(folder, tmp_path / "ema.safetensors", "--ema") == 0
    found = load_file(tmp_path / "ema.safetensors")
    assert not deviations(found, {name: expected[name] for name in found}, 1e-6)


def test_what_has_no_average_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone() as mesh:
        trainer = build(job_config(tmp_path), mesh)
        folder = save(trainer)
    with pytest.raises(CheckpointError, match=r"optim\.ema_decay"):
        Checkpoint(folder).kind(AVERAGE)
    assert export(folder, tmp_path / "ema.safetensors", "--ema") == 1
    assert "optim.ema_decay" in capsys.readouterr().err


@pytest.mark.parametrize("decay", ["1", "-0.1"])
def test_refused(decay: str) -> None:
    with pytest.raises(ConfigError, match="ema_decay"):
        job_config("runs/x", f"optim.ema_decay={decay}")
