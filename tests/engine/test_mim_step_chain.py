"""CLIP -> teacher of a MIM run -> image tower of the next CLIP, through the entry point, shards and checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from data.shards.write import write_shard
from engine import train
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import first_phase
from engine.config.read import Config, resolve
from engine.parallel.device import prepare
from engine.trainer import Trainer
from models.config import ModelConfig, VisionConfig
from tests.checkpoint.jobs import MODEL, alone, build, job_config, run_steps, save
from tests.data.shard_factory import good_sample
from tests.engine.mim_jobs import Layout, mim_config
from tools import inspect
from tools.report import __main__ as report
from tools.timeline import __main__ as timeline

# Two by two patches like the teacher's 28 px at patch 14: it sees the pictures at its own size.
STUDENT = asdict(
    ModelConfig(
        embed_dim=24,
        vision=VisionConfig(image_size=32, patch_size=16, depth=3, width=48, head_width=16, mlp_hidden=96, norm="rms"),
    )
)
STEPS = 3

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `clip` (a checkpoint) and the run `mim` that it taught, by the entry point."""
    folder = tmp_path_factory.mktemp("chain")
    with alone() as mesh:
        clip = build(job_config(folder / "clip"), mesh)
        run_steps(clip, 1)
        save(clip)
    shard = str(folder / "pictures.tar")
    write_shard(shard, [(key, {"png": members["png"]}) for key, members in map(good_sample, range(10))])
    (folder / "mim.yaml").write_text(
        yaml.safe_dump(
            {
                "objective": "mim",
                "run_dir": str(folder / "mim"),
                "model": STUDENT,
                "mim": {"teacher": str(folder / "clip"), "masked_patches": 2, "min_block": 1},
                "data": {"shards": shard, "workers": 0},
                "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4},
                "optim": {"name": "adamw", "lr_vision": 1e-3, "warmup_steps": 1, "layer_decay_vision": 1.0},
                "checkpoint": {"every_steps": STEPS},
                "log": {"timeline_steps": [1], "every_steps": 1},
            }
        )
    )
    assert train.main([str(folder / "mim.yaml")]) == 0
    return folder


def _records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_curve_without_captions(runs: Path) -> None:
    records = _records(runs / "mim")
    assert [record["step"] for record in records] == list(range(STEPS))
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(1 <= record["masked_patches"] <= 2 for record in records)
    assert not {"lr_text", "i2t_top1", "logit_scale"} & records[0].keys()
    assert all(record["bad_samples"] == 0 for record in records), "a picture without a caption is not bad here"


def test_the_console_and_the_tools_read_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(runs / "mim.yaml"), f"train.steps={STEPS + 1}"]) == 0  # resumes
    said = capsys.readouterr()
    assert f"step {STEPS + 1}/{STEPS + 1}  loss -" in said.out and "top-1" not in said.out
    assert f"resumed from {runs}/mim" in said.err and "teacher from" in said.err
    assert [record["step"] for record in _records(runs / "mim")] == list(range(STEPS + 1))
    assert inspect.main([str(runs / "mim"), "--verify", "--tensors"]) == 0
    assert "vision.embed.mask_token" in capsys.readouterr().out
    assert report.main([str(runs / "mim"), "--out", str(runs / "report.html")]) == 0
    assert timeline.main([str(runs / "mim")]) == 0


def _next_clip(runs: Path, *overrides: str) -> Config:
    model = {**STUDENT, "text": MODEL["text"]}
    tree = {"run_dir": str(runs / "next"), "model": model, "data": {"shards": ["-"]}}
    return resolve(tree, ["train.global_batch_size=4", "train.micro_batch_size=4", *overrides])


def test_the_student_becomes_the_image_tower_of_a_clip(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init = (f"init.vision={runs}/mim", "init.reinit=[vision.head.projection.*]")
    with alone() as mesh:
        trainer = Trainer(first_phase(_next_clip(runs, *init)), mesh, prepare())
        trainer.resume()
        held = {tensor.name: parameter.detach().clone() for tensor, parameter in trainer.towers.logical_parameters()}
    student = Checkpoint(sorted((runs / "mim" / "checkpoints").glob("step_*"))[-1])
    taken = [name for name in held if name in student.shapes()]
    assert len(taken) == len([name for name in held if name.startswith("vision.")]) - 1
    assert all(torch.equal(held[name], student.read_whole(name)) for name in taken)
    assert "mask_token" in capsys.readouterr().err, "what stays behind is named"


def test_a_student_is_no_teacher(runs: Path) -> None:
    student = ModelConfig(vision=VisionConfig(**STUDENT["vision"]))
    mim = {"teacher": str(runs / "mim"), "teacher_model": STUDENT, "masked_patches": 2, "min_block": 1}
    config = mim_config(Layout(), model=student, **mim)
    with alone() as mesh, pytest.raises(CheckpointError, match=r"(?s)not a MIM student.*missing.*vision\.head\.proj"):
        Trainer(first_phase(config), mesh, prepare())
