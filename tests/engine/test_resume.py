"""A run that is killed without warning and started again continues the curve it would have had, to the bit."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_factory import make_shards

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY, KILLED_AFTER = 12, 4, 6
PATIENCE_S = 300

pytestmark = pytest.mark.dist


def start(shards: list[str], run_dir: Path, *overrides: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The job of two stages under torchrun; each step is a line of its output."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", "2", *torchrun),
        *("-m", "engine.train", "examples/quickstart/train.yaml"),
        f"data.shards=[{','.join(shards)}]",
        f"run_dir={run_dir}",
        "parallel.tensor=1",
        "parallel.pipeline=2",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "train.keep_activations=1",
        *([] if any(o.startswith("train.steps") for o in overrides) else [f"train.steps={STEPS}"]),
        "optim.warmup_steps=2",
        *([] if any(o.startswith("checkpoint.every") for o in overrides) else [f"checkpoint.every_steps={EVERY}"]),
        "log.every_steps=1",
        "log.tensorboard=false",
        *overrides,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the bit, one entry a whole line of the metrics."""
    text = (run_dir / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["samples_seen"], r["logit_scale"]) for r in records]


def has_checkpoint(run_dir: Path) -> bool:
    """A complete one, which a resumed run would take."""
    return (run_dir / "checkpoints" / "latest").exists()


def kill_in_the_middle(job: subprocess.Popen[str], run_dir: Path) -> None:
    """SIGKILL to torchrun, its ranks and their readers, some steps behind a checkpoint."""
    assert job.stdout is not None
    output = []
    for line in job.stdout:  # blocks until the next step is reported
        output.append(line)
        if has_checkpoint(run_dir) and len(curve(run_dir)) >= KILLED_AFTER:
            break
    assert job.poll() is None, f"the job ended before it could be killed:\n{''.join(output)[-3000:]}"
    family = [os.pidfd_open(pid) for pid in family_of(job.pid)]
    assert len(family) >= 3  # torchrun starts its ranks in sessions of their own: a signal to one group misses them
    for process in family:
        signal.pidfd_send_signal(process, signal.SIGKILL)
    for process in family:
        assert select.select([process], [], [], PATIENCE_S)[0], "a killed process lives on"
        os.close(process)
    job.stdout.close()
    job.wait()


def family_of(ancestor: int) -> list[int]:
    """The process and everything it started, directly or not."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    family = [ancestor]
    for member in family:
        family += [pid for pid, parent in parents.items() if parent == member]
    return family


def finish(job: subprocess.Popen[str]) -> None:
    """Wait for a good end."""
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output[-3000:]


@pytest.mark.slow  # the chaos tests of every CI run kill and resume, too
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, precision: str) -> None:
    shards = make_shards(tmp_path, [20, 13])
    more = (f"train.precision={precision}", "train.logit_scale=null")
    finish(start(shards, tmp_path / "whole", *more))
    kill_in_the_middle(start(shards, tmp_path / "killed", *more), tmp_path / "killed")
    assert KILLED_AFTER <= len(curve(tmp_path / "killed")) < STEPS
    finish(start(shards, tmp_path / "killed", *more))
    whole = curve(tmp_path / "whole")
    assert [row[0] for row in whole] == list(range(STEPS))
    assert len({row[1] for row in whole}) == STEPS, "a curve that stands still proves nothing"
    assert curve(tmp_path / "killed") == whole


@pytest.mark.slow
def test_killed_behind_the_border_of_a_phase(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [20, 13])
    phases = f"[{{name: a, steps: 5}}, {{name: b, steps: {STEPS - 5}, train: {{patch_dropout: 0.0}}}}]"
    more = (f"phases={phases}", "train.logit_scale=null")
    finish(start(shards, tmp_path / "whole", *more))
    kill_in_the_middle(start(shards, tmp_path / "killed", *more), tmp_path / "killed")
    finish(start(shards, tmp_path / "killed", *more))
    assert len(curve(tmp_path / "whole")) == STEPS
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
