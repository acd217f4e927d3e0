"""What stops a job before it starts is one line from one rank, and what starts says what it trains."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import DataError
from engine.config.phases import plan_job
from engine.config.read import ConfigError, resolve
from engine.paths import check_paths
from engine.pipeline import outputs
from engine.train import main
from tests.data.shard_factory import make_shards

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model=tiny-18b", "model.text.vocab_size=49408", "train.precision=fp32", "train.micro_batch_size=4"]


def start(ranks: int, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a job of the recipe for B/16."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(ranks),
    ]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "engine.train", "examples/b16.yaml", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.dist
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["data.shards=gone/{00..03}.tar"],
            "shard gone/00.tar (from data.shards entry 'gone/{00..03}.tar') does not exist",
        ),
        pytest.param(
            ["data.shards=a.tar", "train.stepz=3"], "command line: train.stepz is not a setting", marks=pytest.mark.slow
        ),
        pytest.param(
            ["data.shards=a.tar", "train.global_batch_size=7"],
            "train.global_batch_size 7 is not a multiple",
            marks=pytest.mark.slow,
        ),
        pytest.param(["data.shards=a.tar", "data.shards=b.tar"], "data.shards is given twice", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_the_first_and_only_line_of_all_ranks(arguments: list[str], said: str, tmp_path: Path) -> None:
    status, out, err = start(3 if "train.stepz=3" in arguments else 2, f"run_dir={tmp_path}/run", *arguments)
    assert status == 1 and out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines[0].startswith("error: ") and said in lines[0]
    own, launchers = lines[:1], lines[1:]  # torchrun has a summary of its own
    assert not [line for line in launchers if line.startswith("error:") or 'File "/work' in line or "engine/" in line]
    assert err.count(own[0]) == 1 and not (tmp_path / "run").exists()


def test_a_start_says_what_is_trained_on_what(tmp_path: Path) -> None:
    make_shards(tmp_path, [5, 7])
    status, out, err = start(
        1, *SMALL, f"data.shards={tmp_path}/{{00000..00001}}.tar", f"run_dir={tmp_path}/run", "train.steps=3",
        "data.workers=0", "train.global_batch_size=8", "optim.warmup_steps=1", "checkpoint.every_steps=0",
        "log.tensorboard=off",
    )  # fmt: skip
    assert status == 0 and "error" not in err
    lines = out.splitlines()
    assert lines[0] == "the model of examples/b16.yaml (b16) is replaced by the preset tiny-18b"
    assert lines[1].startswith("command line: model.preset=tiny-18b, model.text.vocab_size=49408")
    assert lines[2].startswith("inherited from examples/b16.yaml: train.text_micro_batch_size=128, ")
    assert "optim.lr_vision=0.0003" in lines[2] and "train.steps" not in lines[2]
    model = re.compile(
        r"model tiny-18b with text\.vocab_size 49408 instead of 512: 1\.\d\d M parameters, images of 56 px, "
        r"global batch 8; 2 shards, 12 samples, 1\.5 steps an epoch, 2 epochs"
    )
    assert [line for line in lines if model.fullmatch(line)]


def of(tmp_path: Path, *overrides: str, **more: object) -> None:
    tree = {"model": "tiny-18b", "data": {"shards": f"{tmp_path}/*.tar"}, "run_dir": str(tmp_path / "run")}
    check_paths(plan_job(resolve(tree | more, list(overrides))))


def test_every_path_is_looked_at(tmp_path: Path) -> None:
    (shard,) = make_shards(tmp_path, [2])
    of(tmp_path)
    evaluated = ["evaluate.every_steps=1", f"evaluate.shards={shard}"]
    of(tmp_path, *evaluated)
    of(tmp_path, "data.shards=[https://example.org/{0..9}.tar]")  # left to who reads it
    (tmp_path / "file").write_text("")
    for overrides, said in (
        (["data.shards=[https://example.org/0.tar,gone.tar]"], "shard gone.tar"),
        (
            [evaluated[0], "evaluate.shards=gone.tar"],
            "gone.tar .from evaluate.shards entry 'gone.tar'",
        ),
        (
            [evaluated[0], "evaluate.shards=none/data.shards/*.tar"],
            "evaluate.shards entry 'none/data.shards/",
        ),
        ([*evaluated, "evaluate.classes=gone.txt"], "evaluate.classes gone.txt does not exist"),
        (["init.vision=gone"], "init.vision gone does not exist"),
        (["init.text=gone.pt"], "init.text gone.pt does not exist"),
        (["checkpoint.resume=gone"], "checkpoint.resume gone does not exist"),
        ([f"run_dir={tmp_path}/file/run"], "run_dir .*/file/run cannot be made: .*/file is a file"),
        ([f"run_dir={tmp_path}/file"], "is a file"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            of(tmp_path, *overrides)


def test_a_job_that_goes_on_needs_its_last_phase_only(tmp_path: Path) -> None:
    make_shards(tmp_path, [2])
    phases = [{"name": "one", "steps": 1, "data": {"shards": "gone.tar"}}, {"name": "two", "steps": 1}]
    more = {"phases": phases, "checkpoint": {"every_steps": 1}, "init": {"vision": "gone"}}
    with pytest.raises(DataError, match=r"phase 'one': shard gone\.tar"):
        of(tmp_path, **more)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    of(tmp_path, **more)
    of(tmp_path, "checkpoint.resume=gone", **more)  # what it began with
    with pytest.raises(DataError, match="phase 'one'"):
        of(tmp_path, "checkpoint.resume=none", **more)
    with pytest.raises(DataError, match="phase 'one'"):  # it comes last now
        of(tmp_path, **more | {"phases": phases[::-1]})


def test_the_other_ranks_leave_the_word_to_the_first() -> None:
    """Rank 1 waits to be ended: torchrun does that when rank 0 has ended."""
    code = "from engine.resilience.exit import refuse; print('waits', flush=True); refuse(ValueError('told twice'))"
    waiting = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | {"RANK": "1", "LOCAL_RANK": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
    waiting.terminate()
    assert waiting.communicate(timeout=300)[1] == ""


def test_another_system_than_linux_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything asks for what only Linux has: a signal when torchrun ends, its clocks, a flag between threads."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main([str(ROOT / "examples" / "b16.yaml"), "data.shards=gone.tar"]) == 1
    assert capsys.readouterr().err == "error: training needs Linux: darwin lacks its signals, locks and clocks\n"


def test_what_only_a_machine_can_refuse_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """model.backend=auto looks at the machine when the job has begun; here no linear is one that keeps its output."""
    monkeypatch.setattr(outputs, "can_keep", lambda _: False)
    shards = f"data.shards={make_shards(tmp_path, [8])[0]}"
    small = [*SMALL, "train.global_batch_size=8", "train.steps=1", "data.workers=0", "train.keep_outputs=fc2"]
    assert main([str(ROOT / "examples" / "b16.yaml"), shards, f"run_dir={tmp_path}/run", *small]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: model.backend=auto has chosen Transformer Engine") and error.count("\n") == 1
