"""The dry run of masked-feature distillation: FLOPs by the benchmark's formulas, memory, the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.config.read import Config, load_config
from engine.objectives.mim.objective import block_masks
from models.tensors.flops import block_flops, head_flops
from tests.engine.mim_jobs import Layout, mim_config
from tools.cost.counts import vision_parameters
from tools.cost.work import model_flops
from tools.dryrun import __main__ as dryrun
from tools.dryrun.rank import RankReport, dry_run
from tools.dryrun.report import flops_by_part

RECIPES = Path(__file__).parents[2] / "examples"


def replica(config: Config, layout: Layout) -> list[RankReport]:
    """Dry runs of every rank of the first replica."""
    stages = range(0, layout.ranks, layout.tensor * layout.data)
    return [dry_run(config, layout.ranks, stage + t) for stage in stages for t in range(layout.tensor)]


def more_than_the_formulas(config: Config, rows: int, masked: int) -> int:
    """FLOPs of `rows` images with `masked` masked patches that run and that tools/cost/work.py does not count.

    Masked patches and the class token are rows of zeros of the patch projection, which has one product in the backward,
    not two: pixels need no gradient. Masks end short. Each tensor rank predicts. The teacher projects every patch.
    """
    vision, teacher, wanted = config.model.vision, config.mim.teacher_model, config.mim.masked_patches
    assert teacher is not None
    patches, parallel = vision.patches, config.parallel
    row = 2 * 3 * vision.patch_size**2 * vision.width
    copies = 1 if parallel.sequence else parallel.tensor
    projection = rows * row * (2 * copies * (1 + patches) - 3 * (patches - wanted))
    prediction = 3 * 2 * vision.width * teacher.embed_dim * (parallel.tensor * masked - rows * wanted)
    class_row = 2 * 3 * teacher.vision.patch_size**2 * teacher.vision.width
    return (
        projection + prediction + rows * (class_row + (patches - wanted) * head_flops(teacher, teacher.vision.tokens))
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(1, 1, 1, 4), marks=pytest.mark.slow),
        pytest.param(Layout(2, 2, 2, 2), marks=pytest.mark.slow),
        Layout(1, 2, 2, 4, options=("parallel.virtual=2",)),
        Layout(2, 1, 1, 8, options=("parallel.sequence=false",)),
        pytest.param(Layout(1, 4, 1, 3, batch=18), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_flops_of_a_replica_are_those_of_the_formulas(layout: Layout) -> None:
    config = mim_config(layout)
    rows = layout.batch // layout.data
    masked = int(block_masks(config).of_samples(config.train.seed, np.arange(rows)).sum())
    assert masked < rows * config.mim.masked_patches  # some end short
    parts = [flops_by_part(report) for report in replica(config, layout)]
    assert all(part["other"] == 0 for part in parts)
    counted = sum(part[name] for part in parts for name in ("teacher", "forward", "backward"))
    assert counted == rows * model_flops(config) + more_than_the_formulas(config, rows, masked)


@pytest.mark.slow
def test_recomputation_runs_the_blocks_once_more() -> None:
    layout = Layout(1, 1, 1, 4)
    none, full = (
        flops_by_part(dry_run(mim_config(layout, f"train.recompute={kind}"), 1, 0)) for kind in ("none", "full")
    )
    vision = mim_config(layout).model.vision
    blocks = layout.batch * vision.depth * block_flops(vision, 1 + vision.patches)
    assert full["backward"] - none["backward"] == blocks
    assert (none["teacher"], none["forward"]) == (full["teacher"], full["forward"])


def test_a_stage_holds_the_units_of_1f1b_and_the_whole_teacher() -> None:
    layout = Layout(1, 2, 1, 4)
    first, last = replica(mim_config(layout), layout)
    assert (first.in_flight, last.in_flight) == (2, 1)
    held = [report.peaks["backward"].parts["activations"] / report.activation_bytes for report in (first, last)]
    assert 1.8 < held[0] < 2.6 and 0.9 < held[1] < 1.6  # and what a backward needs beside
    message = 4 * (1 + 16) * 32 * 4  # micro-batch x tokens x width x fp32
    assert last.peaks["backward"].parts["messages"] <= message  # one is posted ahead; inputs are activations
    assert first.parameters["teacher"] == last.parameters["teacher"] > 0
    assert first.peaks["forward"].parts["teacher weights"] >= 4 * first.parameters["teacher"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "objective: mim\nmodel: tiny-18b\nmim: {teacher: no/such/file.pt, teacher_model: tiny-18b, masked_patches: 8, "
        "min_block: 4}\ndata: {shards: '-'}\nparallel: {pipeline: 2, virtual: 2}\n"
        "train: {global_batch_size: 16, micro_batch_size: 4, patch_dropout: 0}\n"
    )
    assert dryrun.main([str(file), "--world-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "4, each 2 units of work; at most 5 units wait" in shown and "teacher weights" in shown
    assert dryrun.main([str(file), "--world-size", "2", "--gpu-memory-gb", "0.001"]) == 1
    assert "or parallel.virtual, or set train.recompute=full" in capsys.readouterr().err
    refused = ["mim.teacher_model.attention=flash", "train.precision=bf16"]
    assert dryrun.main([str(file), "--world-size", "2", *refused]) == 1
    assert "add mim.teacher_model.attention=sdpa" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "ranks"), [("18b", 360), ("8b", 384)])
def test_the_recipes_need_what_their_headers_say(folder: str, ranks: int, tmp_path: Path) -> None:
    recipe, file = RECIPES / folder / "1_mim.yaml", tmp_path / "numbers.json"
    arguments = [str(recipe), "--world-size", str(ranks), "--gpu", "a100-40", "--json", str(file)]
    assert dryrun.main(arguments) == 0
    (first,) = json.loads(file.read_text())
    teacher = load_config(recipe).mim.teacher_model
    assert teacher is not None and first["parameters"]["teacher"] == vision_parameters(teacher)
    assert f"{first['peak_bytes'] / 1e9:.0f} GB a GPU (counted by tools.dryrun)" in recipe.read_text()
