"""A log that cannot be written does not end a job."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tests.data.shard_factory import make_shards
from tests.engine.test_start import ROOT, SMALL

PRINTS = """
import logging, sys
from rich.console import Console
from engine.output import lose_lines_and_no_more
lose_lines_and_no_more()
console = Console()
for line in range(3000):
    print("a line of the log", flush=True)
    console.print("a step")
    print("and of standard error", file=sys.stderr, flush=True)
    logging.warning("a warning")
from engine.resilience.exit import leave
leave(7)
"""


def _run(command: list[str], out: IO | int, err: IO | int) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=err)


def test_lines_are_lost_and_no_more() -> None:
    with open("/dev/full", "w") as full:
        both, one = _run(["-c", PRINTS], full, full), _run(["-c", PRINTS], full, subprocess.PIPE)
        gone = _run(["-c", PRINTS], subprocess.PIPE, subprocess.STDOUT)
        assert gone.stdout is not None
        gone.stdout.close()
        said = one.communicate()[1].decode()
        assert [process.wait() for process in (both, one, gone)] == [7, 7, 7]
    assert said.count("WARNING: standard output cannot be written (No space left on device)") == 1
    assert said.count("and of standard error") == 3000


@pytest.mark.slow
def test_a_job_whose_log_is_on_a_full_disk_trains(tmp_path: Path) -> None:
    make_shards(tmp_path, [5, 7])
    command = [
        "-m", "engine.train", "examples/b16.yaml", *SMALL, f"data.shards={tmp_path}/{{00000..00001}}.tar",
        f"run_dir={tmp_path}/run", "train.steps=3", "data.workers=0", "train.global_batch_size=8",
        "optim.warmup_steps=1", "checkpoint.every_steps=0", "log.tensorboard=off",
    ]  # fmt: skip
    with open("/dev/full", "w") as full:
        assert _run(command, full, full).wait() == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
