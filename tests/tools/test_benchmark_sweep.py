"""Sweeps, comparisons and tables of tools.benchmark; the ranks themselves: test_benchmark.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tools.benchmark.__main__ import main
from tools.benchmark.charts import save_result_picture, save_sweep_picture
from tools.benchmark.launch import failure_reason
from tools.benchmark.result import Result, Spread
from tools.benchmark.sweep import points_of
from tools.benchmark.tables import compare, efficiencies, results_table

MACHINE = {"cpu": "a", "cores": 2, "memory_gb": 8.0, "device": "cpu", "torch": "2", "python": "3", "commit": "abc"}


def _result(ranks: int = 1, step_s: tuple[float, float, float] = (0.9, 1.0, 1.2), **changes: Any) -> Result:
    """A batch of 32 in about a second."""
    median = sorted(step_s)[1]
    train = {"global_batch_size": 32, "micro_batch_size": 8, "precision": "fp32", "steps": 6}
    values: dict[str, Any] = {
        "machine": MACHINE,
        "config": {"run_dir": "runs/a", "model": {"embed_dim": 32}, "train": train},
        "world_size": ranks,
        "layout": f"TP 1 × PP 1 × DP {ranks}",
        "threads": 1,
        "data": "synthetic",
        "warmup_steps": 2,
        "step_s": Spread.of(step_s),
        "step_times_s": list(step_s),
        "data_s": 0.01,
        "samples_per_s": 32 / median,
        "tokens_per_s": 9 * 32 / median,
        "model_flops_per_sample": 3e9,
        "executed_flops_per_sample": 4e9,
        "peak_flops_per_s": 1e12,
        "peak_source": "measured",
        "mfu": 0.3,
        "hfu": 0.4,
        "phases_s": {"encode": 0.2, "backward": 0.6, "wait": 0.1, "unheard_of": 0.05},
        "peak_memory_gb": [1.0] * ranks,
        "losses": [3.0, 2.5],
    }
    return Result(**values | changes)


# --- which points ------------------------------------------------------------------------------------------------


def test_points_of_a_sweep() -> None:
    points = points_of(ranks=[1, 4], layouts=None, micro_batches=[2], global_batch=64, weak=False)
    assert [(p.ranks, p.tensor, p.pipeline) for p in points] == [
        (1, 1, 1), (4, 1, 1), (4, 1, 2), (4, 1, 4), (4, 2, 1), (4, 2, 2), (4, 4, 1),
    ]  # fmt: skip
    assert {p.global_batch for p in points} == {64}
    given = points_of(ranks=[4], layouts=[(2, 1), (1, 2)], micro_batches=[2, 4], global_batch=64, weak=False)
    assert [(p.tensor, p.pipeline, p.micro_batch) for p in given] == [(2, 1, 2), (2, 1, 4), (1, 2, 2), (1, 2, 4)]


def test_the_batch_grows_with_the_ranks_in_weak_scaling() -> None:
    points = points_of(ranks=[4, 2, 8], layouts=[(1, 1)], micro_batches=[2], global_batch=64, weak=True)
    assert [p.global_batch for p in points] == [128, 64, 256]


# --- a sweep for real --------------------------------------------------------------------------------------------


@pytest.mark.slow  # torchrun, and ranks that import torch
def test_a_sweep_goes_on_after_a_point_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "job.yaml"
    train = {"global_batch_size": 8, "micro_batch_size": 4, "logit_scale": 20.0}
    config.write_text(yaml.safe_dump({"model": "tiny-18b", "train": train}))
    out = tmp_path / "out"
    sizes = ["--steps=1", "--warmup=1", "--gemm-side=64", f"--out={out}", "--threads=1"]
    assert main(["sweep", str(config), "--ranks=1", "--micro-batches=3,4", *sizes]) == 0
    text = capsys.readouterr().out
    assert "1/2 1ranks-tp1-pp1-mb3-b8: failed: train.global_batch_size 8 is not a multiple" in text
    assert "2/2 1ranks-tp1-pp1-mb4-b8:" in text and "100.0%" in text
    refused, measured = json.loads((out / "sweep.json").read_text())
    assert (refused["result"], measured["failure"]) == (None, "")
    assert measured["result"]["threads"] == 1 and len(measured["result"]["step_times_s"]) == 1
    assert (out / "sweep.png").is_file() and (out / "1ranks-tp1-pp1-mb4-b8" / "result.json").is_file()


def test_a_sweep_without_any_result_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump({"model": "tiny-18b", "train": {"global_batch_size": 8}}))
    assert main(["sweep", str(config), "--ranks=3", f"--out={tmp_path}"]) == 1
    assert "no point of the sweep gave a result" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 4 - 1  # DP 3, PP 3, TP 3


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("W0101 noise\nerror: loss is nan: lower it\nE0101 ChildFailedError:\n", "loss is nan: lower it"),
        ("[rank1]: Traceback (most recent call last):\n[rank1]: torch.OutOfMemoryError: CUDA out of memory\n",
         "torch.OutOfMemoryError: CUDA out of memory"),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n  exitcode  : -9 (pid: 7)\n",
         "a rank was killed (SIGKILL): most likely not enough memory"),
        ("RuntimeError: a\nValueError: b\n", "RuntimeError: a"),
        ("", "exit status 3 without a message"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure(errors: str, reason: str) -> None:
    assert failure_reason(errors, 3) == reason


# --- tables ------------------------------------------------------------------------------------------------------


def test_efficiency_is_throughput_of_a_rank() -> None:
    results = [_result(1, (2.0, 2.0, 2.0)), _result(2, (1.25, 1.25, 1.25)), _result(1, (4.0, 4.0, 4.0))]
    assert efficiencies(results) == pytest.approx([1.0, 0.8, 0.5])


def test_layouts_that_are_not_one_curve_are_named() -> None:
    same = [_result(1), _result(2, losses=[3.0 + 1e-5, 2.0])]
    assert "warning" not in results_table(same)
    assert "first losses at batch 32 differ" in results_table([*same, _result(2, losses=[3.01, 2.0])])


def test_a_ratio_within_the_spread_says_so() -> None:
    slower = _result(step_s=(1.05, 1.1, 1.3))
    lines = compare(_result(), slower).splitlines()
    rate = lines[1].split()
    assert rate[:4] == ["samples/s", "32", "29.09", "0.909"] and "within the spread" in lines[1]
    assert lines[1].split("   ")[-2].strip() == f"{0.9 / 1.3:.3f} - {1.2 / 1.05:.3f}"
    far = compare(_result(), _result(step_s=(2.0, 2.0, 2.1)))
    assert "within the spread" not in far
    assert "differs" not in far


def test_what_differs_is_listed() -> None:
    train: dict[str, Any] = {**_result().config["train"], "steps": 9, "micro_batch_size": 16}
    other = {"run_dir": "runs/b", "model": {"embed_dim": 32}, "train": train}
    b = _result(2, config=other, machine=MACHINE | {"cpu": "b", "commit": "def", "load_1min": 9.0})
    lines = [line for line in compare(_result(), b).splitlines() if line.startswith("differs: ")]
    assert lines == [
        "differs: cpu a → b",
        "differs: commit abc → def",
        "differs: layout TP 1 × PP 1 × DP 1 → TP 1 × PP 1 × DP 2",
        "differs: world_size 1 → 2",
        "differs: train.micro_batch_size 8 → 16",
    ]
    dirty = _result(machine=MACHINE | {"commit": "abc-dirty"})
    assert "not committed" in compare(dirty, dirty)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "real"}, "A was measured with synthetic data, B with real data"),
        ({"model_flops_per_sample": 6e9}, "a sample of A costs 3 GFLOP .*, one of B 6"),
    ],
)
def test_samples_that_are_not_alike_do_not_compare(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(_result(), _result(**changes))
    assert "B / A" in compare(_result(), _result(**changes), anyway=True)


def test_commands_on_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for ranks, file in enumerate(files, start=1):
        _result(ranks).save(Path(file))
    assert main(["compare", *files]) == 0
    assert main(["table", *files, f"--png={tmp_path / 'table.png'}"]) == 0
    out = capsys.readouterr().out
    assert "B / A" in out and "50.0%" in out
    for path in (tmp_path / "table.png", tmp_path / "one.png", tmp_path / "few.png"):
        if path.stem == "one":
            save_result_picture(_result(), path)
        if path.stem == "few":
            save_sweep_picture([_result(), replace(_result(), layout="TP 2 × PP 1 × DP 1")], path)
        with Image.open(path) as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 20) or ()}
        assert (0x00, 0x72, 0xB2) in colours
