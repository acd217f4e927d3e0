"""The chain in miniature runs, stage by stage, and ends with its table, numbers and page."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from engine.callbacks.metrics import METRICS_FILE, read_metrics
from engine.config.read import load_config, to_dict
from examples.chain.chain import FOLDER, SHORT_STEPS, Options, Stages

ROOT = Path(__file__).parents[1]


def _chain(out: Path, *arguments: str) -> str:
    command = ["bash", "examples/chain/run.sh", "--short", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_stages_fit_together() -> None:
    teacher, student, clip = (load_config(FOLDER / f"{stage}.yaml") for stage in ("teacher", "student", "clip"))
    assert student.mim.teacher_model == teacher.model
    assert clip.model.vision == student.model.vision and clip.model.text == teacher.model.text
    assert [student.mim.teacher, clip.init.text, clip.init.vision] == [
        teacher.run_dir,
        teacher.run_dir,
        student.run_dir,
    ]


def test_the_arms_differ_in_their_start_alone(tmp_path: Path) -> None:
    stages = Stages(Options(out=tmp_path, seeds=(0, 7), longer=False, short=False, resume=False))
    arms = []
    for name, tree in (("strong", stages.clip(7)), ("scratch", stages.from_scratch(7))):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        arms.append(to_dict(load_config(path)))
    strong, scratch = arms
    assert strong["train"]["seed"] == 7
    assert strong["init"]["vision"] == str(tmp_path / "student") and scratch["init"]["vision"] is None
    assert strong["init"]["text"] == scratch["init"]["text"] == str(tmp_path / "teacher")
    for arm in arms:
        del arm["init"]
    assert strong == scratch


@pytest.mark.slow
@pytest.mark.dist
def test_the_short_chain_runs_from_teacher_to_page(tmp_path: Path) -> None:
    shown = _chain(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["weak_to_strong"]) == set(result["from_scratch"]) == {"0"}
    assert list(result["phases"]) == ["dropout", "full", "video", "resolution"]
    assert -1 <= result["student"]["loss"] <= 1
    assert result["phases"]["full"] == result["weak_to_strong"]["0"]
    for run, steps in {"student": 1, "clip-0": 4, "scratch-0": 2}.items():
        assert len(read_metrics(tmp_path / run / METRICS_FILE)) == steps * SHORT_STEPS
    assert "bigger CLIP, weak to strong" in shown and (tmp_path / "report.html").is_file()

    clip, student = tmp_path / "clip-0" / METRICS_FILE, tmp_path / "student" / METRICS_FILE
    before = [path.read_bytes() for path in (clip, student)]
    _chain(tmp_path, "--resume", "--longer")
    assert [path.read_bytes() for path in (clip, student)] == before, "a finished run was started again"
    longer = json.loads((tmp_path / "result.json").read_text())
    assert longer.pop("from_scratch_longer")["samples"] == result["compared_samples"] + result["student"]["samples"]
    assert longer == result
