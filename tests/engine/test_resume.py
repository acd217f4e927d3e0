"""A run that is killed without warning and started again continues the curve it would have had, to the bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_factory import make_shards

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6

pytestmark = pytest.mark.dist


def command(shards: list[str], run_dir: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "engine.train", "examples/quickstart/train.yaml"),
        f"data.shards=[{','.join(shards)}]",
        f"run_dir={run_dir}",
        "parallel.tensor=1",
        "parallel.pipeline=2",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "train.keep_activations=1",
        f"train.steps={STEPS}",
        "optim.warmup_steps=2",
        "checkpoint.every_steps=2",
        "log.tensorboard=false",
        *overrides,
    ]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"], r["samples_seen"]) for r in map(json.loads, lines)]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True)


def kill_after_a_checkpoint(job: subprocess.Popen[bytes], run_dir: Path, deadline_s: float = 180) -> None:
    """SIGKILL to launcher and ranks once a checkpoint exists; polls the folder, so it may also come too late."""
    until = time.monotonic() + deadline_s
    while not (run_dir / "checkpoints" / "latest").exists():
        assert time.monotonic() < until, "no checkpoint appeared"
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout=0.02)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, precision: str) -> None:
    shards = make_shards(tmp_path, [20, 13])
    more = (f"train.precision={precision}", "train.logit_scale=null")
    assert start(command(shards, tmp_path / "whole", *more)).wait(timeout=240) == 0
    kill_after_a_checkpoint(start(command(shards, tmp_path / "killed", *more)), tmp_path / "killed")
    assert start(command(shards, tmp_path / "killed", *more)).wait(timeout=240) == 0
    whole = curve(tmp_path / "whole")
    assert [row[0] for row in whole] == list(range(STEPS))
    assert curve(tmp_path / "killed") == whole
