"""The planner of masked-feature distillation: against the simulator, against the dry run, and its command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.read import load_config
from engine.objectives.registry import objective_of
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware
from tools.cost.layout import Layout, layout_of
from tools.cost.mim import mim_estimate, mim_memory
from tools.plan.__main__ import main
from tools.plan.mim import mim_config
from tools.simulate.stage_costs import simulate_config

RECIPE = Path(__file__).parents[3] / "examples" / "18b" / "1_mim.yaml"
CLUSTER = Cluster(hardware=load_hardware("a100-40"), gpus=360, per_node=8)


@pytest.mark.parametrize("cut", [(12, 4, 8), (12, 1, 8), (6, 8, 8), (6, 8, 12), (4, 8, 12)])
def test_the_closed_form_takes_as_long_as_the_simulation(cut: tuple[int, int, int]) -> None:
    names = ("parallel.pipeline", "parallel.virtual", "train.micro_batch_size")
    config = load_config(RECIPE, [f"{name}={size}" for name, size in zip(names, cut, strict=True)])
    found = mim_estimate(config, layout_of(config, 360), CLUSTER)
    assert found.step_s == pytest.approx(simulate_config(config, CLUSTER).step_s, rel=0.015)


def test_memory_is_that_of_the_dry_run() -> None:
    """First rank's peak of `tools.dryrun examples/18b/1_mim.yaml --world-size 24 parallel.pipeline=12
    parallel.virtual=4 train.micro_batch_size=8 train.global_batch_size=96`.
    """
    cut = ["parallel.pipeline=12", "parallel.virtual=4", "train.micro_batch_size=8", "train.global_batch_size=96"]
    config = load_config(RECIPE, cut)
    layout = layout_of(config, 24)
    in_flight = objective_of(config).program(config, layout.data).in_flight(0)
    parts = mim_memory(config, layout, in_flight)
    assert in_flight == 48 and sum(parts.values()) == pytest.approx(31.868e9, rel=0.02)
    counted = {"weights": 1.477e9, "gradients": 2.954e9, "optimizer": 8.862e9, "teacher": 8.701e9}
    assert {name: parts[name] for name in counted} == pytest.approx(counted, rel=1e-3)


def test_more_chunks_wait_less_and_hold_more() -> None:
    config = mim_config("18b", "e14-plus", 105, 4320)
    plain = Layout(
        tensor=2, pipeline=12, data=15, global_batch=4320, micro_batch=8, patch_dropout=0.0, recompute="none"
    )
    one, four = (mim_estimate(config, replace(plain, virtual=chunks), CLUSTER) for chunks in (1, 4))
    assert four.bubble_s < one.bubble_s and four.memory_bytes["activations"] > one.memory_bytes["activations"]
    assert (one.in_flight, four.in_flight) == (12, 59)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model=tiny-18b", "--teacher=tiny-e14", "--gpus=4", "--gpu=h100", "--global-batch=16", "--masked=8"]
    assert main([*asked, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]
    assert best["tensor"] * best["pipeline"] * best["data"] == 4 and best["memory_bytes"]["teacher"] > 0
    assert main(asked) == 0
    assert "taught by tiny-e14" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=tiny-18b", "--masked=8"], "--masked 8 needs --teacher"),
        (["--model=tiny-18b", "--teacher=tiny-e14", "--frames=8"], "--frames is no part of a plan with --teacher"),
        (["--model=18b", "--teacher=18b", "--masked=9"], "no layout of 4 x"),
        (["--model=tiny-18b", "--teacher=nobody"], "nobody"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--gpus=4", "--gpu=a100-40", "--global-batch=16"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
