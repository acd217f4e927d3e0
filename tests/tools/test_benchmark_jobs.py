"""tools.benchmark on the other kinds of jobs: real shards, masked-feature distillation, clips, one phase of several."""

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.parallel.device import prepare
from engine.parallel.mesh import build_mesh
from tests.data.shard_factory import make_shards
from tests.distributed import run_distributed, world
from tests.engine.mim_jobs import MODEL, TEACHER
from tools.benchmark.__main__ import main
from tools.benchmark.measure import measure
from tools.benchmark.options import Options, benchmark_config
from tools.benchmark.result import Result, load_result

pytestmark = [pytest.mark.slow, pytest.mark.dist]

CLIP = {
    "model": {"preset": "tiny-18b", "text": {"vocab_size": 49408, "depth": 2}},
    "data": {"workers": 0},
    "train": {"global_batch_size": 16, "micro_batch_size": 4, "logit_scale": 20.0},
}
MIM = {
    "objective": "mim",
    "model": asdict(MODEL),
    "mim": TEACHER | {"masked_patches": 10, "min_block": 8},
    "data": {"workers": 0},
    "train": {"global_batch_size": 16, "micro_batch_size": 4},
}
PHASES = [{"name": "stills", "steps": 2}, {"name": "video", "steps": 2, "data": {"frames": 2}}]
JOBS: dict[str, tuple[dict[str, Any], Options]] = {
    "real": (CLIP, Options(data="real")),
    "mim": (MIM, Options()),
    "mim-real": (MIM, Options(data="real")),
    "clips": (CLIP | {"data": {"workers": 0, "frames": 2}}, Options()),
    "phase": (CLIP | {"phases": PHASES, "checkpoint": {"every_steps": 2}}, Options(data="real", phase="video")),
}


def write_job(folder: Path, name: str) -> tuple[Path, Options]:
    """The job's YAML, with the folder's shards, and how it is measured."""
    tree, options = JOBS[name]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | {"data": tree["data"] | {"shards": str(folder / "*.tar")}}))
    return path, options


def on_two_stages(folder: str) -> dict[str, dict[str, Any]]:
    """The results of all jobs on this rank."""
    mesh, device = build_mesh(1, 2, world()), prepare()
    results = {}
    for name in JOBS:
        path, given = write_job(Path(folder), name)
        options = replace(given, steps=2, warmup=1, gemm_side=64, out=Path(folder) / f"{name}-2")
        config = benchmark_config(path, ["parallel.pipeline=2"], options, 2)
        results[name] = asdict(measure(config, mesh, device, options))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 24 pictures."""
    folder = tmp_path_factory.mktemp("jobs")
    make_shards(folder, [24, 24])
    return folder


@pytest.fixture(scope="module")
def staged(folder: Path) -> dict[str, dict[str, Any]]:
    """Job -> its result on two stages; one launch."""
    return run_distributed(on_two_stages, 2, folder=str(folder))[0]


def by_command(folder: Path, name: str) -> Result:
    """The job's result on one rank, by the command."""
    path, options = write_job(folder, name)
    out = folder / name
    command = [str(path), "--steps=2", "--warmup=1", "--gemm-side=64", f"--out={out}"]
    assert main([*command, f"--data={options.data}", f"--phase={options.phase}"]) == 0
    return load_result(out / "result.json")


alone = cache(by_command)


@pytest.mark.parametrize("name", JOBS)
def test_one_curve_on_one_rank_and_on_two_stages(name: str, folder: Path, staged: dict[str, dict[str, Any]]) -> None:
    result, on_stages = alone(folder, name), staged[name]
    assert result.losses == pytest.approx(on_stages["losses"], rel=1e-4)
    assert result.losses[0] != result.losses[1]
    assert on_stages["layout"] == "TP 1 × PP 2 × DP 1"
    same = ("data", "model_flops_per_sample", "executed_flops_per_sample")
    assert {key: getattr(result, key) for key in same} == {key: on_stages[key] for key in same}
    assert (folder / name / "result.png").is_file() and list((folder / name / "timeline").iterdir())


def test_real_pictures_are_not_the_synthetic_ones(folder: Path) -> None:
    assert alone(folder, "mim").losses[0] != alone(folder, "mim-real").losses[0]
    assert (alone(folder, "mim").data, alone(folder, "mim-real").data) == ("synthetic", "real")


def test_a_student_has_phases_of_its_own_and_replays_nothing(folder: Path) -> None:
    result = alone(folder, "mim")
    assert {"teacher", "forward", "backward", "exchange"} <= result.phases_s.keys()
    assert result.mfu == result.hfu


def test_a_clip_is_as_many_images_as_it_has_frames(folder: Path) -> None:
    stills, clips, phase = (alone(folder, name) for name in ("real", "clips", "phase"))
    tokens = [result.tokens_per_s / result.samples_per_s for result in (stills, clips, phase)]
    assert tokens == pytest.approx([9, 18, 18])
    assert phase.model_flops_per_sample == clips.model_flops_per_sample > stills.model_flops_per_sample
    assert phase.config["data"]["frames"] == 2


def test_a_teacher_that_is_not_there_is_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = write_job(folder, "mim")
    assert main([str(path), "mim.teacher=none.pt", "--gemm-side=64", f"--out={folder / 'none'}"]) == 1
    assert capsys.readouterr().err == "error: none.pt cannot be read: No such file or directory\n"
