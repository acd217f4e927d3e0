"""Saving: in the background, one at a time, what is kept, what a checkpoint holds."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.callbacks.checkpoint import CheckpointCallback
from engine.callbacks.metrics import CONFIG_FILE, METRICS_FILE, MetricsFile, read_metrics
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import Retention, all_checkpoints, prune, step_folder
from engine.checkpoint.format.lock import LOCK_FILE
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.save import write_rank
from engine.checkpoint.state import Snapshot
from engine.config.read import Config, ConfigError, to_dict
from engine.parallel.mesh import Mesh
from engine.record import Callback, RunInfo
from engine.resilience.status import FAILED, STARTING, write_status
from engine.train import _callbacks
from models.versions import megatron_core_version
from tests.checkpoint.jobs import alone, build, callback_of, drive, job_config, run_steps, save
from tests.data.shard_factory import make_shards


def light(run_dir: Path, *overrides: str) -> Config:
    """A job whose steps are short, where a test is about files."""
    small = ("train.micro_batch_size=16", "model.vision.depth=1", "model.text.depth=1")
    return job_config(run_dir, *small, *overrides)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


def test_the_folder_may_be_in_its_place_as_soon_as_the_last_report_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "saving").mkdir()
    rename = Path.rename

    def rename_and_commit(path: Path, target: Path) -> Path:
        there = rename(path, target)
        return rename(folder, tmp_path / "step") / there.name

    monkeypatch.setattr(Path, "rename", rename_and_commit)
    write_rank(folder, 0, [], [])
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == ["rank_00000.json", "rank_00000.safetensors"]


def test_a_checkpoint_holds_everything(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(job_config(tmp_path), mesh)
    drive(trainer, callback := callback_of(trainer), 2)
    callback.saver.wait()
    manifest = Checkpoint(step_folder(tmp_path, 2)).manifest
    assert manifest.content == "training" and manifest.seed == 0
    assert manifest.position is not None
    assert (manifest.position.step, manifest.position.samples_seen) == (2, 32)
    assert manifest.config["model"]["vision"]["depth"] == 5 and manifest.config["run_dir"] == str(tmp_path)
    assert manifest.layout == {"tensor": 1, "pipeline": 1, "data": 1}
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.versions["megatron-core"] == megatron_core_version()
    names = {t.name for t, _ in trainer.towers.logical_parameters()}
    for kind in ("weight", "moment1", "moment2"):
        assert manifest.shapes(kind).keys() == names
    # fp32 weight and two moments, once each, and nothing else but headers.
    elements = sum(torch.Size(shape).numel() for shape in manifest.shapes().values())
    assert 12 * elements < manifest.size_bytes() < 12 * elements * 1.2


def test_the_state_is_that_of_the_moment_of_the_save(tmp_path: Path, mesh: Mesh) -> None:
    """Training goes on while the background writes; the files must not see it."""
    trainer = build(light(tmp_path), mesh)
    run_steps(trainer, 2)
    parts = Snapshot(trainer.optimizer, mesh).take()
    then = [part.values.clone() for part in parts]
    run_steps(trainer, 1)
    assert all(part.values.equal(value) for part, value in zip(parts, then, strict=True))


def test_saves_never_overlap_and_the_last_one_is_waited_for(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(light(tmp_path, "checkpoint.every_steps=1", "checkpoint.keep_last=9"), mesh)
    saver = CheckpointCallback(trainer).saver
    saver.save(trainer.position, {}, {})
    first = saver._committing
    saver.save(trainer.position, {}, {})
    assert first is not None
    assert not first._thread.is_alive() and first.error is None
    saver.wait()
    shutil.rmtree(step_folder(tmp_path, 0))
    callback = callback_of(trainer)
    for done in range(1, 7):
        drive(trainer, callback, 1)
        # When a save begins, every earlier one is a checkpoint; after the last step, all are.
        assert {f.name for f in all_checkpoints(tmp_path)} >= {f"step_{n:08d}" for n in range(1, done)}
    assert len(all_checkpoints(tmp_path)) == 6
    assert trainer.checkpoint_stall_s > 0


def test_an_error_in_training_does_not_lose_the_save_under_way(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(light(tmp_path), mesh)
    callback = callback_of(trainer)
    drive(trainer, callback, 2)
    callback.on_end({})
    Checkpoint(step_folder(tmp_path, 2)).verify()


def test_fit_reports_the_stall_and_gives_the_folder_back(tmp_path: Path, mesh: Mesh) -> None:
    shards = ",".join(make_shards(tmp_path, [24]))
    text = ("model.text.vocab_size=49408", "model.text.context_length=16")
    config = light(tmp_path / "run", f"data.shards=[{shards}]", "data.workers=0", "log.tensorboard=false", *text)
    trainer = build(config, mesh)
    callbacks = _callbacks(config, trainer)
    settings = tmp_path / "run" / CONFIG_FILE
    assert not settings.exists()  # the data may be refused until the first step: the folder is another run's so far
    trainer.fit(callbacks)
    assert yaml.safe_load(settings.read_text()) == to_dict(config)
    stalls = [record["checkpoint_stall_s"] for record in read_metrics(tmp_path / "run" / METRICS_FILE)]
    # A save after steps 1, 3 and 5; the next step's record carries what it cost.
    assert [stall > 0 for stall in stalls] == [False, False, True, False, True, False]
    assert trainer.lock is None and (tmp_path / "run" / LOCK_FILE).read_text() == ""
    assert [folder.name for folder in all_checkpoints(tmp_path / "run")] == ["step_00000004", "step_00000006"]


class _Unable(Callback):
    def on_start(self, run: RunInfo) -> None:
        raise CheckpointError("cannot start")


def test_a_callback_that_cannot_start_ends_the_others(tmp_path: Path, mesh: Mesh) -> None:
    """Their files are closed, the readers are gone, and the folder is given back."""
    shards = ",".join(make_shards(tmp_path, [16]))
    trainer = build(light(tmp_path / "run", f"data.shards=[{shards}]", "data.workers=0"), mesh)
    metrics = MetricsFile()
    with pytest.raises(CheckpointError, match="cannot start"):
        trainer.fit([metrics, _Unable()])
    assert metrics._file is not None and metrics._file.closed and trainer.lock is None


class _Counter(Callback):
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"count": 3, "best": [1.5, None], "mean": torch.arange(3.0)}

    def state_dict(self) -> dict[str, Any]:
        return self.state


def test_callback_states_come_back(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(light(tmp_path), mesh)
    trainer.callbacks = [_Counter(), CheckpointCallback(trainer)]
    run_steps(trainer, 1)
    save(trainer)
    found = build(light(tmp_path), mesh)._resumed_states
    assert found.keys() == {"_Counter"}
    state = found["_Counter"]
    assert state["count"] == 3 and state["best"] == [1.5, None] and state["mean"].equal(torch.arange(3.0))


def test_what_is_kept(tmp_path: Path, mesh: Mesh) -> None:
    overrides = ("checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.keep_every_steps=3")
    trainer = build(light(tmp_path, *overrides, "checkpoint.keep_best=score", "checkpoint.keep_best_is=max"), mesh)
    drive(trainer, callback := callback_of(trainer, 8), 8, score=[0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    callback.saver.wait()
    assert [f.name for f in all_checkpoints(tmp_path)] == [f"step_{n:08d}" for n in (2, 3, 6, 7, 8)]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000008"
    assert prune(tmp_path, Retention(last=1)) and [f.name for f in all_checkpoints(tmp_path)] == ["step_00000008"]


def test_a_number_that_is_not_finite_is_not_the_best(tmp_path: Path, mesh: Mesh) -> None:
    """Of a step that health skipped, for example; every comparison with NaN is false."""
    settings = ("checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_best=score")
    trainer = build(light(tmp_path, *settings), mesh)
    drive(trainer, callback := callback_of(trainer), 4, score=[math.nan, 0.5, -math.inf, 0.7])
    callback.saver.finish()
    assert [f.name for f in all_checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]


def test_the_latest_stays_even_if_its_step_is_not_the_highest(tmp_path: Path, mesh: Mesh) -> None:
    """A run that was taken back to an earlier checkpoint: its own saves are the ones to resume from."""
    trainer = build(light(tmp_path), mesh)
    for _ in range(3):
        run_steps(trainer, 1)
        save(trainer)
    back = build(light(tmp_path, f"checkpoint.resume={step_folder(tmp_path, 2)}", "checkpoint.keep_last=1"), mesh)
    run_steps(back, 1)
    back.position.step = 1  # lower than what is there
    save(back)
    assert step_folder(tmp_path, 1) in all_checkpoints(tmp_path)
    assert build(light(tmp_path), mesh).position.step == 1


def test_an_unknown_metric_to_keep_by_is_an_error_at_the_first_save(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(light(tmp_path, "checkpoint.keep_best=top1"), mesh)
    with pytest.raises(CheckpointError, match=r"keep_best 'top1' is not in the step record: \['loss', 'step'\]"):
        drive(trainer, callback_of(trainer), 2)


def test_a_fresh_run_is_not_mixed_with_an_earlier_one(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(light(tmp_path), mesh)
    run_steps(trainer, 1)
    save(trainer)
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
        build(light(tmp_path, "checkpoint.resume=none"), mesh)


@pytest.mark.parametrize("wish", ["path", "none"])
def test_a_job_that_is_started_again_by_its_first_command_goes_on(
    tmp_path: Path, mesh: Mesh, wish: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun, SLURM and loops know no other command: it must not begin the run anew, or be refused."""
    first = build(light(tmp_path / "first"), mesh)
    run_steps(first, 1)
    origin, run = save(first), tmp_path / "run"
    command = light(run, f"checkpoint.resume={origin if wish == 'path' else wish}")
    trainer = build(command, mesh)
    began = trainer.position.step
    run_steps(trainer, 2)
    save(trainer)
    if wish == "none":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another start")
        write_status(run, STARTING)
        with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
            build(command, mesh)  # refused, and started again for that
        write_status(run, FAILED, step=began + 2)
    assert build(command, mesh).position.step == began + 2
    assert f"goes on with what it has made (step_{began + 2:08d}) since it began with" in capsys.readouterr().err
    if wish == "path":  # gone back to, by another command: it begins there
        other = save(first).rename(tmp_path / "step_00000001")
        assert build(light(run, f"checkpoint.resume={other}"), mesh).position.step == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.keep_every_steps=3", "a multiple of checkpoint.every_steps 2"),
        ("checkpoint.keep_best_is=best", "choose min or max"),
        ("checkpoint.keep_last=0", "at least 1"),
        ("checkpoint.keep_best=loss checkpoint.every_steps=0", "keep_best loss has no effect without checkpoint.every"),
        ("checkpoint.keep_best=masked_patches", "does not measure .objective=contrastive masks none"),
        ("checkpoint.keep_best=logit_scale train.logit_scale=9", r"does not measure .train\.logit_scale=9\.0 is fixed"),
        ("checkpoint.keep_best=i2t_top1", "i2t_top1, where more is better: set checkpoint.keep_best_is=max"),
        ("checkpoint.keep_best=eval_loss", r"evaluate\.every_steps 0 does not divide checkpoint\.every_steps 2"),
        ("checkpoint.skip=[a]", "needs checkpoint.resume=PATH"),
        ("init.reinit=[a]", "has no effect without init.vision"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_config("x", *override.split())


def test_the_manifest_is_plain_json_with_a_hash_of_itself(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(light(tmp_path), mesh)
    run_steps(trainer, 1)
    content = json.loads((save(trainer) / "manifest.json").read_text())
    assert content.keys() == {"sha256", "manifest"} and len(content["sha256"]) == 64
    entry = content["manifest"]["tensors"]["weight/vision.head.projection.weight"]
    assert entry == {"dtype": "F32", "shape": [16, 32], "parts": []}
    table = content["manifest"]["tables"][0]
    assert table["ranks"] == {"first": 0, "distance": 1, "number": 1} and "moment2" in table["kinds"]
    (row,) = [row for row in table["buckets"][0]["rows"] if row[0] == "vision.head.projection.weight"]
    assert row[2:] == [None, 0, 0] and row[1] + 512 <= table["buckets"][0]["length"]
