"""tools.benchmark on real ranks: what is measured, that it is one curve at every layout, and its commands."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from engine.config.read import Config, ParallelConfig
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import build_mesh
from models.tensors.flops import embedding_flops
from tests.distributed import run_distributed, world
from tools.benchmark.__main__ import main
from tools.benchmark.measure import measure
from tools.benchmark.options import TRACED_STEPS, Options, benchmark_config
from tools.benchmark.result import Result, Spread, load_result, summary
from tools.cost.counts import text_executed_flops, vision_executed_flops, vision_forward_flops
from tools.cost.work import executed_flops, model_flops, tokens_per_sample
from tools.timeline.spans import read_step

CONFIG = {
    "model": "tiny-18b",
    "train": {"global_batch_size": 16, "micro_batch_size": 4, "keep_activations": 1, "logit_scale": 20.0, "steps": 2},
    "optim": {"warmup_steps": 0},
}
LAYOUTS = {"TP 2 × PP 1 × DP 1": (2, 1), "TP 1 × PP 2 × DP 1": (1, 2), "TP 1 × PP 1 × DP 2": (1, 1)}
STEPS, WARMUP = 3, 1


def _write_config(folder: Path) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def _options(out: Path) -> Options:
    return Options(steps=STEPS, warmup=WARMUP, out=out, gemm_side=64)


def _config(folder: Path, out: Path, ranks: int, *overrides: str) -> Config:
    return benchmark_config(_write_config(folder), list(overrides), _options(out), ranks)


def _measure_on_ranks(folder: str) -> list[dict]:
    results = []
    for name, (tensor, pipeline) in LAYOUTS.items():
        out = Path(folder) / name
        layout = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}")
        mesh, device = build_mesh(tensor, pipeline, world()), prepare()
        results.append(asdict(measure(_config(Path(folder), out, 2, *layout), mesh, device, _options(out))))
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One rank's result."""
    folder = tmp_path_factory.mktemp("alone")
    with job(ParallelConfig()) as (mesh, device):
        return measure(_config(folder, folder, 1), mesh, device, _options(folder))


@pytest.mark.dist
@pytest.mark.slow
def test_what_two_ranks_measure(tmp_path: Path, alone: Result) -> None:
    of_ranks = run_distributed(_measure_on_ranks, 2, folder=str(tmp_path))
    for name, *trees in zip(LAYOUTS, *of_ranks, strict=True):
        first, second = (Result(**{**tree, "step_s": Spread(**tree["step_s"])}) for tree in trees)
        assert first.layout == name and first.world_size == 2
        assert first.step_times_s == second.step_times_s  # those of the slowest rank
        assert first.losses == pytest.approx(alone.losses, rel=1e-4)  # the same samples, the same curve
        assert len(first.peak_memory_gb) == 2 and min(first.peak_memory_gb) > 0.05
        assert first.peak_flops_per_s == second.peak_flops_per_s
        timeline = read_step(tmp_path / name)
        assert timeline.step == WARMUP + STEPS + TRACED_STEPS - 1 and len(timeline.rows) == 2
    pipeline = of_ranks[0][1]
    assert {"wait", "exchange", "replay", "encode", "backward", "optimizer"} <= pipeline["phases_s"].keys()


def test_numbers_of_one_rank_follow_from_each_other(alone: Result) -> None:
    assert alone.step_s == Spread.of(alone.step_times_s) and alone.step_s.runs == STEPS
    assert alone.samples_per_s == pytest.approx(16 / alone.step_s.median)
    assert alone.tokens_per_s == pytest.approx(9 * alone.samples_per_s)  # 8 of 16 patches and the class token
    assert alone.mfu == pytest.approx(alone.samples_per_s * alone.model_flops_per_sample / alone.peak_flops_per_s)
    assert alone.hfu / alone.mfu == pytest.approx(alone.executed_flops_per_sample / alone.model_flops_per_sample)
    assert {"encode", "encode_text", "loss", "replay", "backward", "optimizer"} <= alone.phases_s.keys()
    assert alone.losses[0] != alone.losses[-1]
    assert alone.config["train"]["steps"] == WARMUP + STEPS + TRACED_STEPS


def test_executed_flops_count_what_runs_again(tmp_path: Path) -> None:
    config = _config(tmp_path, tmp_path, 1)
    once = executed_flops(config, kept_share=1.0, keeps_text=True)
    assert once == 3 * (vision_executed_flops(config.model, 9) + text_executed_flops(config.model))
    assert once < model_flops(config)
    assert executed_flops(config, kept_share=0.0, keeps_text=False) == pytest.approx(once * 4 / 3)
    full = _config(tmp_path, tmp_path, 1, "train.recompute=full")
    image = executed_flops(config, kept_share=0.0, keeps_text=True) - once
    assert executed_flops(full, kept_share=0.0, keeps_text=True) == pytest.approx(once + 2 * image)
    assert executed_flops(full, kept_share=0.75, keeps_text=True) == pytest.approx(once + 1.25 * image)


def test_frames_of_a_clip_are_images(tmp_path: Path) -> None:
    one, eight = _config(tmp_path, tmp_path, 1), _config(tmp_path, tmp_path, 1, "data.frames=4")
    assert model_flops(eight) == model_flops(one) + 3 * 3 * vision_forward_flops(one.model, 9)
    assert tokens_per_sample(eight) == 4 * tokens_per_sample(one)


def test_a_teacher_runs_once_and_its_student_three_times(tmp_path: Path) -> None:
    mim = (
        "objective=mim",
        "mim.teacher=teacher.pt",
        "mim.teacher_model=tiny-18b",
        "mim.masked_patches=1",
        "mim.min_block=1",
    )
    config = _config(tmp_path, tmp_path, 1, "train.keep_activations=0", "train.logit_scale=100", *mim)
    tower = vision_forward_flops(config.model, 17)
    not_projected = embedding_flops(config.model.vision, 2)
    assert model_flops(config) == 3 * (tower - not_projected) + tower
    assert executed_flops(config, kept_share=1.0, keeps_text=True) == model_flops(config)
    assert tokens_per_sample(config) == 17


def test_a_result_is_kept_and_read_back(tmp_path: Path, alone: Result) -> None:
    alone.save(tmp_path / "result.json")
    assert load_result(tmp_path / "result.json") == alone
    text = summary(alone)
    assert f"{alone.mfu:.1%}" in text and "measured: a 64 × 64 matrix product" in text
    (tmp_path / "other.json").write_text(json.dumps({"step_s": {}}))
    with pytest.raises(ValueError, match=r"other.json is not a result of tools.benchmark"):
        load_result(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml does not exist"),
        (["@config", "train.micro_batch_size=5"], "not a multiple of DP 1 x train.micro_batch_size 5"),
        (["@config", "--data=real"], "data.shards is empty"),
        (["@config", "--phase=video"], "phase 'video' is not one of the config's: it has none"),
        (["sweep", "@config", "--ranks=3,4", "--scaling=weak"], "no whole number"),
        (["compare", "missing.json", "missing.json"], "missing.json"),
        (["table", "@config"], "job.yaml is not a result of tools.benchmark"),
    ],
)
def test_mistakes_are_one_clear_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(_write_config(tmp_path))
    assert main([config if argument == "@config" else argument for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
