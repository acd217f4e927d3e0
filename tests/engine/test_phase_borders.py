"""A job of three phases: stopped anywhere, also at a border, and gone on with at another layout, it is the same job."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.callbacks.checkpoint import CheckpointCallback
from engine.callbacks.metrics import MetricsFile, read_metrics
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.matching import Exceptions
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import plan_job
from engine.config.read import Config, ParallelConfig, resolve
from engine.job import train_job
from engine.parallel.agree import PeerFailed
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import build_mesh, meet
from engine.record import Callback, Record, RunInfo
from engine.resilience.status import read_status, write_status
from engine.trainer import Trainer
from models.towers.posembed import resize_pos_embed
from tests.data.shard_factory import make_shards
from tests.distributed import run_distributed, world
from tests.engine.test_layouts import random_pairs
from tests.gather import whole_weights
from tests.golden import deviation, local_batch

pytestmark = pytest.mark.dist

ENDS = (3, 5, 8)
"""Steps of the job at which the phases end."""
POSITIONS = "vision.embed.pos_embed"


def config_of(folder: str, run: str, *overrides: str) -> Config:
    """Half of the patches; all patches of another source in smaller batches; a higher resolution, optimizer afresh."""
    tree = {
        "run_dir": f"{folder}/{run}",
        "model": "tiny-18b",
        "data": {"shards": f"{folder}/00000.tar", "workers": 0},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "logit_scale": None},
        "optim": {"lr_vision": 0.01, "lr_text": 0.01, "warmup_steps": 2, "ema_decay": 0.5},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "phases": [
            {"name": "half", "steps": 3},
            {
                "name": "whole", "samples": 8, "data": {"sources": [{"name": "b", "shards": f"{folder}/00001.tar"}]},
                "train": {"global_batch_size": 4, "patch_dropout": 0.0},
            },
            {
                "name": "large", "steps": 3, "schedule": "restart", "optimizer": "reset",
                "model": {"vision": {"image_size": 84}}, "optim": {"lr_vision": 0.005, "warmup_steps": 1},
            },
        ],
    }  # fmt: skip
    return resolve(tree, ["model.text.depth=2", "model.text.vocab_size=49408", *overrides])


class _Stopped(Exception):
    """The job is ended by its test."""


class _StopAt(Callback):
    """Ends the job before a step, or, at a border, before the next phase has done one."""

    def __init__(self, step: int):
        self.step = step

    def on_start(self, run: RunInfo) -> None:
        if run.start_step == self.step:
            raise _Stopped

    def on_step(self, record: Record) -> None:
        if record["step"] + 1 == self.step and self.step not in ENDS:
            raise _Stopped


def run_job(folder: str, run: str, *overrides: str, stop_at: int | None = None) -> None:
    """All phases that are left. Collective over all ranks."""
    config = config_of(folder, run, *overrides)
    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world())

    def callbacks(trainer: Trainer) -> list[Callback]:
        assert mesh.world.rank or read_status(Path(config.run_dir))["outcome"] == "starting", "behind a border, too"
        metrics: list[Callback] = [MetricsFile()] if mesh.world.rank == 0 else []
        stop: list[Callback] = [] if stop_at is None else [_StopAt(stop_at)]
        return [*metrics, CheckpointCallback(trainer), *stop]

    try:
        train_job(plan_job(config), mesh, prepare(), callbacks)
    except (_Stopped, PeerFailed):  # at a border all ranks raise what the first of them met
        meet(mesh.world, torch.device("cpu"))
        return
    assert stop_at is None


def curve(folder: Path, run: str) -> list[tuple[Any, ...]]:
    records = read_metrics(folder / run / "metrics.jsonl")
    keys = ("step", "phase", "samples_seen", "lr_vision", "loss", "grad_norm", "logit_scale")
    return [tuple(record[key] for key in keys) for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the job has run without a stop, on one rank."""
    folder = tmp_path_factory.mktemp("phases")
    make_shards(folder, [20, 15])
    with job(ParallelConfig()):
        run_job(str(folder), "whole")
    return folder


def test_the_job_goes_through_its_phases(whole: Path) -> None:
    records = curve(whole, "whole")
    assert [record[0] for record in records] == list(range(8))
    assert [record[1] for record in records] == ["half"] * 3 + ["whole"] * 2 + ["large"] * 3
    assert [record[2] for record in records] == [8, 16, 24, 28, 32, 40, 48, 56]
    of_source = [record.get("samples_b") for record in read_metrics(whole / "whole" / "metrics.jsonl")]
    assert of_source == [None] * 3 + [4, 8] + [None] * 3  # the order of a phase begins with it
    rates = [record[3] for record in records]
    cosine = [0.5 * (1 + torch.tensor(torch.pi * i / n).cos().item()) for i, n in ((1, 3), (2, 3), (1, 2))]
    expected = [0.005, 0.01, 0.01, 0.01 * cosine[0], 0.01 * cosine[1], 0.005, 0.005, 0.005 * cosine[2]]
    assert rates == pytest.approx(expected)


def checkpoint(folder: Path, run: str, step: int) -> Checkpoint:
    return Checkpoint(folder / run / "checkpoints" / f"step_{step:08d}")


def test_outputs_kept_in_every_phase_do_not_show(whole: Path) -> None:
    """Other batches, other tokens a picture, another number of passes: the formula's bytes and buffers follow."""
    with job(ParallelConfig()):
        run_job(str(whole), "outputs", "train.keep_outputs=all")
    assert curve(whole, "outputs") == curve(whole, "whole")


def test_every_border_has_a_checkpoint_that_says_where_it_is(whole: Path) -> None:
    for step, name, updates in ((3, "half", 3), (5, "whole", 5), (8, "large", 3)):
        position = checkpoint(whole, "whole", step).manifest.position
        assert position is not None
        assert (position.phase, position.updates) == (name, updates)


def test_what_crosses_a_border(whole: Path) -> None:
    """The state of a phase that has begun and done nothing yet."""
    config = config_of(str(whole), "whole")
    before = checkpoint(whole, "whole", 5)
    with job(ParallelConfig()) as (mesh, device):
        phase = plan_job(config).phases[2]
        trainer = Trainer(phase, mesh, device)
        trainer.begin(before, None)
        assert (trainer.position.step, trainer.position.samples_seen, trainer.position.phase) == (5, 32, "large")
        assert (trainer.optimizer.step_count, trainer.optimizer.update_count) == (0, 0)
        for tower in trainer.optimizer.towers:
            assert not any(moment.any() for moment in chain(*tower.moments.values()))
            for s, piece in tower.shards.owned():
                name, part = tower.shards.tensors[piece.tensor].name, slice(piece.start, piece.stop)
                for kind, values in (("weight", tower.master), ("average", tower.average)):
                    stored = before.read_whole(name, kind)
                    expected = resize_pos_embed(stored, 6) if name == POSITIONS else stored
                    assert values[s][part].equal(expected.flatten()), name


def test_kept_moments_cross_a_border_but_for_an_interpolated_table(whole: Path) -> None:
    config = config_of(str(whole), "whole")
    config.phases[2] = replace(config.phases[2], optimizer="keep")
    before = checkpoint(whole, "whole", 5)
    with job(ParallelConfig()) as (mesh, device):
        phase = plan_job(config).phases[2]
        trainer = Trainer(phase, mesh, device)
        trainer.begin(before, None)
        assert trainer.optimizer.update_count == 5
        for tower in trainer.optimizer.towers:
            for s, piece in tower.shards.owned():
                name, part = tower.shards.tensors[piece.tensor].name, slice(piece.start, piece.stop)
                for kind, values in tower.moments.items():
                    stored = before.read_whole(name, kind).flatten()
                    expected = torch.zeros(part.stop - part.start) if name == POSITIONS else stored
                    assert values[s][part].equal(expected), (name, kind)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=SLOW) for stop in (2, 4, 5, 7))])
def test_stopped_anywhere_and_gone_on_with(whole: Path, stop: int) -> None:
    """Inside each phase, and at both borders."""
    with job(ParallelConfig()):
        run_job(str(whole), f"stop-{stop}", stop_at=stop)
        run_job(str(whole), f"stop-{stop}")
    assert curve(whole, f"stop-{stop}") == curve(whole, "whole")


def run_at_two_layouts(folder: str, stop: int) -> None:
    """A job that changes its layout."""
    run_job(folder, f"layouts-{stop}", "parallel.tensor=2", stop_at=stop)
    run_job(folder, f"layouts-{stop}", "parallel.pipeline=2")


@pytest.mark.parametrize("stop", [6, pytest.param(5, marks=SLOW)])
def test_another_layout_goes_on_with_the_same_job(whole: Path, stop: int) -> None:
    """At a border, and inside a phase. Gradient norms are not compared: steep right after moments have started at 0,
    they show 100 times the difference of the weights.
    """
    run_distributed(run_at_two_layouts, 2, folder=str(whole), stop=stop)
    found, expected = curve(whole, f"layouts-{stop}"), curve(whole, "whole")
    assert [record[:3] for record in found] == [record[:3] for record in expected]
    for i in (3, 4, 6):
        assert [record[i] for record in found] == pytest.approx([record[i] for record in expected], rel=2e-5)
    average = checkpoint(whole, f"layouts-{stop}", 8).read_whole(POSITIONS, "average")
    assert deviation(average, checkpoint(whole, "whole", 8).read_whole(POSITIONS, "average")) < 1e-4


def test_a_border_crossed_again_takes_back_the_steps_behind_it(whole: Path) -> None:
    """As a rewind does: the moments of the steps behind the border go, too."""
    before = checkpoint(whole, "whole", 5)
    with job(ParallelConfig()) as (mesh, device):
        phase = plan_job(config_of(str(whole), "whole")).phases[2]
        trainer = Trainer(phase, mesh, device)
        trainer.begin(before, None)
        trainer.step(local_batch(*random_pairs(phase.config, 0), mesh, start_position=32))
        towers = trainer.optimizer.towers
        assert all(moment.any() for tower in towers for moment in chain(*tower.moments.values()))
        trainer.begin(before, None)
        assert not any(moment.any() for tower in towers for moment in chain(*tower.moments.values()))
        assert trainer.optimizer.update_count == 0


def test_a_border_leaves_out_what_the_checkpoint_is_told_to(whole: Path) -> None:
    name = "text.projection.weight"
    before = Checkpoint(checkpoint(whole, "whole", 5).folder, Exceptions(reinit=[name]))
    with job(ParallelConfig()) as (mesh, device):
        phase = plan_job(config_of(str(whole), "whole")).phases[2]
        trainer = Trainer(phase, mesh, device)
        fresh = whole_weights(trainer)
        trainer.begin(before, None)
        kept = [key for key, value in whole_weights(trainer).items() if value.equal(fresh[key])]
        assert kept == [name]
        assert trainer.recovery.began is None, "a rewind to it would leave that tensor as it is"


def test_shards_of_phases_to_come_are_looked_for_at_the_start(whole: Path) -> None:
    def begin(config: Config) -> None:
        with job(ParallelConfig()) as (mesh, device):
            train_job(plan_job(config), mesh, device, lambda trainer: [CheckpointCallback(trainer)])

    (whole / "fresh").mkdir()
    write_status(whole / "fresh", "stopped")  # by an earlier start
    config = config_of(str(whole), "fresh")
    config.phases[1].data["sources"][0]["shards"] = [f"{whole}/gone.tar"]
    with pytest.raises(CheckpointError, match=r"phase 'whole': shard .*gone\.tar .* does not exist"):
        begin(config)
    assert not (whole / "fresh" / "checkpoints").exists()
    status = read_status(whole / "fresh")
    assert status["outcome"] == "failed" and "gone.tar" in status["reason"], "who starts stopped jobs again would go on"
    begin(replace(config, run_dir=f"{whole}/whole"))  # what lies behind the run is not needed any more
    assert read_status(whole / "whole")["outcome"] == "finished"


@pytest.mark.slow
def test_a_rewind_right_behind_a_border_crosses_it_again(whole: Path) -> None:
    with job(ParallelConfig()) as (mesh, device):
        run_job(str(whole), "rewind", stop_at=5)
        phase = plan_job(config_of(str(whole), "rewind", "health.on_nonfinite=rewind")).phases[2]
        trainer = Trainer(phase, mesh, device)
        trainer.begin(checkpoint(whole, "rewind", 5), None)
        before = whole_weights(trainer)
        trainer.towers.text_side.tower.projection.weight.data.fill_(torch.nan)
        images, tokens = random_pairs(phase.config, 0)
        trainer.step(local_batch(images, tokens, mesh, start_position=32))
        assert trainer.position.rewinds == 1 and trainer.position.step == 6
        assert (trainer.optimizer.step_count, trainer.optimizer.update_count) == (1, 0)
        after = whole_weights(trainer)
        assert all(after[name].equal(before[name]) for name in before)


def test_a_past_that_changed_is_refused(whole: Path) -> None:
    config = config_of(str(whole), "whole")
    config.phases[0].train["global_batch_size"] = 4
    phase = plan_job(config).phases[2]
    with job(ParallelConfig()) as (mesh, device):
        trainer = Trainer(phase, mesh, device)
        with pytest.raises(CheckpointError, match="has seen 32 samples at step 5, the phases of this config say 20"):
            trainer.begin(checkpoint(whole, "whole", 5), None)


def test_inspect_names_the_phase(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.inspect import main

    assert main([str(whole / "whole" / "checkpoints" / "step_00000005")]) == 0
    assert "phase whole, step 5" in capsys.readouterr().out
