"""The search and the command around it: what it finds, what it writes, what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from engine.config.read import check_layout, load_config, preset_model
from tools.cost.cluster import Cluster
from tools.cost.hardware import Hardware, load_hardware, profile_names
from tools.cost.kernels import Kernels
from tools.cost.layout import Layout, PlanError
from tools.cost.memory import peak_memory
from tools.plan.__main__ import main
from tools.plan.estimate import estimate
from tools.plan.search import Found, Job, candidates, search
from tools.plan.table import WIDTH, show
from tools.plan.write import settings
from tools.plan.zero3 import Zero3, best_zero3, zero3_memory, zero3_time

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["--model", "b16", "--gpus", "16", "--gpu", "a100-40", "--global-batch", "4096"]


def job(
    model: str = "b16", gpus: int = 16, batch: int = 4096, gpu: str = "a100-40", dropout: float = 0.5, frames: int = 1
) -> Job:
    """A job on nodes of 8."""
    cluster = Cluster(hardware=load_hardware(gpu), gpus=gpus, per_node=8)
    return Job(model=preset_model(model), cluster=cluster, global_batch=batch, patch_dropout=dropout, frames=frames)


@pytest.fixture(scope="module")
def paper() -> Found:
    """The 18B on a fifteenth of the paper's GPUs, 256 pairs each for its 300: the same stages, one replica."""
    return search(job("18b", 24, 6_144))


def test_layouts_fit_and_keep_all_that_fits(paper: Found) -> None:
    model, usable = preset_model("18b"), load_hardware("a100-40").usable_bytes
    layouts = [entry.layout for entry in paper.best if entry.layout is not None]
    assert any(layout.keep for layout in layouts) and len(layouts) > 10
    for layout in layouts:
        assert peak_memory(model, layout).total <= usable
        if layout.recompute == "none" and layout.keep + 1 < layout.micro_batches:
            assert peak_memory(model, replace(layout, keep=layout.keep + 1)).total > usable


def test_pipelines_beat_tensor_parallelism_at_clip_batches(paper: Found) -> None:
    times = {(e.layout.tensor, e.layout.pipeline): e.time.total for e in paper.best if e.layout is not None}
    assert times[2, 12] < times[4, 6] < times[8, 3]


def test_parts_add_up(paper: Found) -> None:
    for entry in paper.best:
        assert sum(vars(entry.time).values()) == pytest.approx(entry.time.total)
        assert entry.mfu == pytest.approx(entry.hfu * entry.model_flops / entry.executed_flops)
        assert entry.gpu_hours(1e9) == pytest.approx(1e9 / entry.samples_s / 3600 * 24)


def test_every_candidate_is_accepted_by_the_engine(tmp_path: Path) -> None:
    small = job("tiny-18b", 8, 32)
    any_estimate = best_zero3(small.model, small.cluster, 32, 0.5)
    checked = 0
    for layout in [*list(candidates(small))[::3], *list(candidates(replace(small, frames=2)))[::9]]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(settings("tiny-18b", replace(any_estimate, layout=layout), 640)))
        assert check_layout(load_config(file), 8) == layout.data
        checked += 1
    assert checked > 20


def test_zero3_at_full_length_needs_gradcache() -> None:
    half, full = (best_zero3(preset_model("18b"), job("18b", 360).cluster, 108_000, dropout) for dropout in (0.5, 0.0))
    assert half.fits and "GradCache" not in half.name
    assert full.fits and "GradCache" in full.name


def test_zero3_computes_and_keeps_what_one_stage_does() -> None:
    """Kernels and last blocks are the same for both; only who holds the weights differs."""
    cluster, model = job("18b", 360).cluster, preset_model("18b")
    layout = Layout(data=360, global_batch=360 * 15, micro_batch=15, keep=1)
    plain, checkpoints = (Zero3(pairs=15, checkpoints=on) for on in (False, True))
    stage = estimate(model, layout, cluster)
    assert zero3_time(model, layout, plain, cluster).compute == pytest.approx(stage.time.compute)
    assert zero3_memory(model, layout, plain).activations == pytest.approx(stage.memory.activations, rel=1e-6)
    assert zero3_memory(model, layout, checkpoints).activations < 0.1 * stage.memory.activations
    found = best_zero3(model, cluster, 108_000, 0.5)
    assert found.hfu / found.mfu == pytest.approx(0.9836 * 4 / 3, rel=1e-4)  # models/blocks/last_block.py


def test_clips_cost_what_their_frames_cost() -> None:
    """8,640 clips of 4 frames are the images of 34,560 pairs, with a quarter of the captions and of the loss."""
    clips, pairs = job("18b", 72, 8_640), job("18b", 72, 34_560)
    layout = Layout(tensor=1, pipeline=8, data=9, global_batch=34_560, micro_batch=48, text_micro_batch=16)
    of_clips = replace(layout, global_batch=8_640, frames=4)
    assert of_clips.micro_batches == layout.micro_batches
    still, clip = (estimate(clips.model, each, clips.cluster) for each in (layout, of_clips))
    assert clip.images_per_node_s * clip.time.total == pytest.approx(still.images_per_node_s * still.time.total)
    zero3 = [best_zero3(each.model, each.cluster, each.global_batch, 0.5, n) for each, n in ((pairs, 1), (clips, 4))]
    for images, frames in ((still, clip), zero3):
        assert 0.95 < frames.time.total / images.time.total < 1
        assert frames.memory.activations == pytest.approx(images.memory.activations, rel=0.01)
        assert frames.model_flops / images.model_flops == pytest.approx(4 * 0.984, rel=0.002)


def test_slow_networks_hurt_zero3_more(tmp_path: Path) -> None:
    slow = yaml.safe_load((ROOT / "tools/cost/hardware/a100-40.yaml").read_text()) | {"nic_gb_s": 0.8}
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(slow))
    layout = Layout(tensor=2, pipeline=12, data=15, global_batch=23_040, micro_batch=16, text_micro_batch=16)
    ratio = {}
    for name in ("a100-40", str(tmp_path / "slow.yaml")):
        each = job("18b", 360, 23_040, gpu=name)
        zero3 = best_zero3(each.model, each.cluster, each.global_batch, 0.5)
        ratio[name] = zero3.time.total / estimate(each.model, layout, each.cluster).time.total
    fast, slow = ratio.values()
    assert fast < 1 and slow > 1.5 * fast


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(gpus=12), "take 8 or 16"),
        (dict(batch=8), "at most 8 GPUs"),
        (dict(dropout=1.0), "[0, 1)"),
        (dict(gpus=0), "at least 1"),
        (dict(frames=0), "--frames 0"),
        (dict(gpus=1000, batch=1009), "1000"),
    ],
)
def test_impossible_numbers_are_refused(given: dict, named: str) -> None:
    with pytest.raises(PlanError) as error:
        search(job(**given))
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", profile_names())
def test_profiles_are_complete(name: str) -> None:
    assert isinstance(load_hardware(name), Hardware)


@pytest.mark.parametrize(
    ("content", "named"), [("memory_gb: 3", "missing"), ("[", "YAML"), ("memory_gb: 3\nspeed: 4", "speed")]
)
def test_broken_profiles_are_refused(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(PlanError, match=named):
        load_hardware(str(tmp_path / "mine.yaml"))
    with pytest.raises(PlanError, match="a100-40"):
        load_hardware("a100-41")


def test_the_command_prints_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--top", "3"]) == 0
    printed = capsys.readouterr().out
    for word in ("ZeRO-3", "MFU", "HFU", "bubble", "stash", "GPU-hours", "checkpoint"):
        assert word in printed
    assert "not a multiple" not in printed


def test_no_cell_is_cut_where_the_output_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The longest name of a layout and the largest numbers of the paper's job."""
    many = job("18b", 360, 108_000)
    layout = Layout(
        tensor=2, pipeline=12, virtual=24, data=15, global_batch=108_000, micro_batch=600, keep=12, text_micro_batch=300
    )
    layout = replace(layout, shard="weights", shard_ranks=8, outputs_budget_gb=163.7, offload_outputs=True)
    entry = replace(estimate(many.model, layout, many.cluster), layout=layout)
    zero3 = best_zero3(many.model, many.cluster, 108_000, 0.5)
    show(many, Found(best=[entry], tried=1, nearest=None), zero3, 6e9, 10, Console(width=WIDTH, highlight=False))
    assert "…" not in capsys.readouterr().out


def test_settings_of_the_job_are_those_of_every_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = ["train.freeze=[vision.*]", f"data.features={tmp_path / 'l.npz'}", "data.crop_scale=[1,1]"]
    asked = [*features, "train.loss=sigmoid", "train.mask_false_negatives=captions", "optim.name=adamw"]
    small = [*SMALL, "--patch-dropout", "0", "--host-gb", "9", "--json", "--write", str(tmp_path / "plan")]
    assert main([*small, *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    for entry in found["layouts"]:
        layout = entry["layout"]
        assert (layout["features"], layout["loss"], layout["told_by"]) == (True, "sigmoid", ["captions"])
        assert entry["step_s"]["compute"] == 0 and not layout["offload_stash"]
    assert found["zero3"]["step_s"]["compute"] == 0 == found["zero3"]["memory_bytes"]["activations"]
    written = load_config(tmp_path / "plan" / "b16-16xa100-40.yaml")
    assert written.train.freeze == ["vision.*"] and written.data.features and written.optim.name == "adamw"
    assert main([*SMALL, "--patch-dropout", "0"]) == 0 and "sigmoid" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel.pipeline=2", "parallel.pipeline is what the plan finds"),
        ("model.vision.depth=3", "model.vision.depth is what the plan finds"),
        ("train.freeze=[image.*]", "train.freeze: image.* matches no parameter"),
        ("train.losses=sigmoid", "train.losses"),
    ],
)
def test_settings_that_no_plan_takes_are_one_line(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, setting]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_tokens_are_samples_times_kept_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--gpus", "2", "--global-batch", "512", "--tokens", "99e6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1e6  # 1 + 98 of 196 patches


def test_a_model_that_fits_nowhere_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "18b", "--gpus", "2", "--gpu", "a100-40", "--global-batch", "512"]) == 1
    captured = capsys.readouterr()
    assert "nearest" in captured.err and "--gpu" in captured.err and captured.err.count("\n") == 1
    assert main(["--model", "18c", "--gpus", "8", "--gpu", "h100", "--global-batch", "512"]) == 1
    assert capsys.readouterr().err.startswith("error: model '18c'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0.5"], "--samples 0.5 must be at least 1"),
        (["--gpu", "h101"], "--gpu h101 is neither a file nor a profile"),
        (["--write", "/dev/null/plan"], "/dev/null/plan"),
        (["--kernels", "compiled"], "a fused RMSNorm, but the norms of b16 are layer: take fused or eager"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("option", [["--samples", "-5"], ["--top", "0"], ["--tokens", "nan"], ["--gpus", "many"]])
def test_options_of_another_type_are_one_clear_line(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*SMALL, *option])
    error = capsys.readouterr().err
    assert option[0] in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_batch_that_few_layouts_divide_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--global-batch", "4099"]) == 0
    assert "--global-batch 4,099 is not a multiple of the 16 GPUs" in capsys.readouterr().out.replace("\n", " ")


def test_planning_imports_no_torch() -> None:
    code = "import sys; from tools.plan.__main__ import main; assert 'torch' not in sys.modules, 'torch'; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_in_fp8_only_layouts_are_searched_that_the_engine_takes() -> None:
    fp8 = Kernels(elementwise="compiled", fp8=True)
    cluster = Cluster(hardware=load_hardware("h100"), gpus=16, per_node=8)
    job = Job(model=preset_model("18b"), cluster=cluster, global_batch=16 * 422, patch_dropout=0.5, kernels=fp8)
    assert job.pairs_multiple == 16 and job.whole_batch == 16 * 416
    found = list(candidates(job))
    assert found and all(layout.packed_tokens(job.model.vision) % 16 == 0 for layout in found)
    assert min(layout.replica for layout in found) > 1, "422 pairs of 129 tokens are no multiple of 16"
    with pytest.raises(PlanError, match="multiples of 16, as fp8 needs: take 256"):
        search(replace(job, global_batch=17 * 9))
    blackwell = replace(cluster, hardware=load_hardware("b200"))
    assert replace(job, cluster=blackwell).pairs_multiple == 32
    assert replace(job, kernels=Kernels()).pairs_multiple == 1
