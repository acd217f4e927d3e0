"""Which numbers of ranks a recipe can go on with, and what may change there."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.errors import ConfigError
from engine.config.layout import check_layout
from engine.config.phases import Job
from engine.config.read import read_job
from engine.resilience.elastic import fit_job, fitting, in_words, most_ranks
from tests.chaos.ranks import TINY, launch
from tests.data.shard_factory import make_shards
from tools.elastic import main

RECIPE = """
model: 18b
data: {shards: [x]}
parallel: {tensor: 1, pipeline: 8, virtual: 2}
train: {global_batch_size: 108000, micro_batch_size: 50, text_micro_batch_size: 50, precision: bf16}
"""
"""The 18B on 45 nodes of 8 as TP 1 x PP 8 x DP 45."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("recipe") / "job.yaml"
    file.write_text(RECIPE)
    return str(file)


@pytest.fixture(scope="module")
def recipe(path: str) -> Job:
    return read_job(path)


def test_one_dead_node_of_45_costs_five(recipe: Job) -> None:
    configs = [phase.config for phase in recipe.phases]
    nodes = {came: most_ranks(configs, 8 * came) for came in (45, 44, 40, 39, 35, 31)}
    assert {came: fit.ranks // 8 for came, fit in nodes.items()} == {45: 45, 44: 40, 40: 40, 39: 36, 35: 32, 31: 30}
    assert nodes[45].configs == tuple(configs) and nodes[45].changed == {}
    assert nodes[44].changed == {"parallel.round_size": 9}
    for fit in nodes.values():
        assert check_layout(fit.configs[0], fit.ranks) == fit.ranks // 8


def test_sharded_weights_work_all_micro_batches_in_one_round_on_any_number_of_ranks(path: str) -> None:
    sharded = ("parallel.pipeline=1", "parallel.virtual=48", "parallel.shard=weights", "parallel.round_size=6")
    config = read_job(path, [*sharded]).phases[0].config
    assert check_layout(config, 360) == 360
    fit = most_ranks([config], 352)
    assert fit.ranks == 300 and fit.changed["parallel.round_size"] is None


def test_what_changes_leaves_the_batch_and_never_needs_more_memory(recipe: Job) -> None:
    before = recipe.phases[0].config
    for came in range(8, 361, 8):
        fitted = fitting(before, came)
        if fitted is None:
            continue
        assert 0.5 * 50 <= fitted.train.micro_batch_size <= 50
        same = replace(fitted.train, micro_batch_size=50, keep_activations=before.train.keep_activations)
        assert same == before.train
        assert replace(fitted.parallel, round_size=None) == before.parallel


def test_the_job_that_runs_says_what_it_runs_with(recipe: Job) -> None:
    job, fit = fit_job(recipe, 352)
    assert job.config.parallel.round_size == job.phases[0].config.parallel.round_size == 9
    assert in_words(fit, 352) == "elastic: 320 of 352 ranks work with parallel.round_size=9, 32 stand by"
    with pytest.raises(ConfigError, match=r"no number of ranks up to 7 that is a multiple of .* = 8 fits"):
        fit_job(recipe, 7)


def test_the_command_prints_every_number_of_nodes(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [path, "--nodes"]
    assert main([*command, "44:45"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "   44    352   320        32  parallel.round_size=9"
    assert main([*command, "1", "--nodes-of", "4"]) == 1
    assert capsys.readouterr().err.startswith("error: no number of ranks up to 4 ")


@pytest.mark.slow
@pytest.mark.dist
def test_a_job_goes_on_with_fewer_ranks_on_the_same_curve(tmp_path: Path) -> None:
    """Four ranks, then three, of which one stands by: DP must divide the batch."""
    from tests.engine.test_resume import curve

    shards = make_shards(tmp_path, [20, 13])
    common = [*TINY, f"data.shards=[{','.join(shards)}]", "parallel.elastic=true", "checkpoint.every_steps=3"]

    def run(name: str, size: int, steps: int) -> str:
        folder = tmp_path / name
        options = [f"run_dir={folder}", f"train.steps={steps}", "optim.min_lr_ratio=1"]
        started = launch("examples/quickstart/train.yaml", [*common, *options], size, tmp_path / "log")
        assert started.end() == [0] * size, started.text
        return started.text

    run("whole", 4, 6)
    run("fewer", 4, 3)
    assert "elastic: 2 of 3 ranks work with the settings as they are, 1 stand by" in run("fewer", 3, 6)
    whole, fewer = curve(tmp_path / "whole"), curve(tmp_path / "fewer")
    assert [row[0] for row in fewer] == list(range(6))
    for one, other in zip(whole, fewer, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
