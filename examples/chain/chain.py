"""Run the chain, stage by stage: python -m examples.chain.chain [--short] [--seeds 0,1,2] [--longer] [--out DIR]
[--resume].

Every stage is an ordinary job: its config is written to OUT/configs and started with torchrun on four ranks. Started by
run.sh, which sees to the environment.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.callbacks.metrics import METRICS_FILE, read_metrics
from engine.checkpoint.format.folders import step_folder
from engine.config.read import Config
from engine.config.text import read_text
from engine.config.typed import typed
from examples.chain.results import Chain, report

FOLDER = Path(__file__).parent
RANKS = 4
COMPARED_PHASES = 2
"""The first phases of clip.yaml, up to which the CLIP is compared with the one from scratch."""
CLIP_PICTURES = 1500
"""Pictures that are set in motion: more than the video phase needs."""
SHORT_STEPS = 2
"""Of every stage and phase of --short."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    out: Path
    seeds: tuple[int, ...]
    longer: bool
    short: bool
    resume: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    options = _parse(argv)
    try:
        report(_run(options))
    except subprocess.CalledProcessError as error:
        print(f"chain: stopped, exit status {error.returncode} of {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="examples/chain/run.sh", description="The paper's chain in miniature.")
    parser.add_argument("--short", action="store_true", help="a few steps of each stage, to see that everything works")
    parser.add_argument("--seeds", default="0", help="of the comparison with a CLIP from scratch, e.g. 0,1,2")
    parser.add_argument(
        "--longer", action="store_true", help="also a CLIP from scratch with as many more steps as the student has"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/chain"), help="folder to write")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier start has finished there")
    found = parser.parse_args(argv)
    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in found.seeds.split(",")))
    except ValueError:
        parser.error(f"--seeds {found.seeds}: give whole numbers with commas between them, as in 0,1,2")
    return Options(out=found.out, seeds=seeds, longer=found.longer, short=found.short, resume=found.resume)


def _run(options: Options) -> Chain:
    stages = Stages(options)
    stages.prepare()
    teacher = stages.train("teacher", stages.settings("teacher"))
    student = stages.train("student", stages.settings("student"))
    first, *others = options.seeds
    strong = {first: stages.train(f"clip-{first}", stages.clip(first, whole=True))}
    strong |= {seed: stages.train(f"clip-{seed}", stages.clip(seed)) for seed in others}
    scratch = {seed: stages.train(f"scratch-{seed}", stages.from_scratch(seed)) for seed in options.seeds}
    longer = None
    if options.longer:
        extra = stages.from_scratch(first, extra_steps=stages.student_steps)
        longer = stages.train(f"scratch-longer-{first}", extra)
    before, after = stages.clip_scores(strong[first])
    shown = ["--predictions", str(strong[first] / "predictions.json")]
    stages.evaluate(strong[first], "pictures", strong[first] / "result.json", *shown)
    return Chain(
        out=options.out,
        teacher=teacher,
        student=student,
        strong=strong,
        scratch=scratch,
        longer=longer,
        compared_phase=stages.compared_phase,
        clips_before=before,
        clips_after=after,
    )


class Stages:
    """The jobs of one chain."""

    def __init__(self, options: Options):
        self.options, self.out = options, options.out
        self._clip = self.settings("clip")
        self.compared_phase = self._clip["phases"][COMPARED_PHASES - 1]["name"]
        self.student_steps: int = self.settings("student")["train"]["steps"]

    def settings(self, stage: str) -> dict[str, Any]:
        """The tree of STAGE.yaml with paths below --out, cut short if asked for."""
        text = (FOLDER / f"{stage}.yaml").read_text(encoding="utf-8")
        tree = typed(read_text(text.replace("runs/chain", str(self.out)), f"{stage}.yaml"), Config, "")
        if self.options.short:
            for part in tree.get("phases", [tree["train"]]):
                part["steps"] = SHORT_STEPS
            tree["optim"]["warmup_steps"] = 1
        return tree

    def clip(self, seed: int, *, whole: bool = False) -> dict[str, Any]:
        """The bigger CLIP from the student, up to the comparison or over all phases."""
        tree = self.settings("clip")
        tree["train"]["seed"] = seed
        if not whole:
            tree["phases"] = tree["phases"][:COMPARED_PHASES]
        return tree

    def from_scratch(self, seed: int, extra_steps: int = 0) -> dict[str, Any]:
        """The same without the student, and with so many more steps in the first phase."""
        tree = self.clip(seed)
        tree["init"] = {"text": tree["init"]["text"]}
        tree["phases"][0]["steps"] += extra_steps
        return tree

    def prepare(self) -> None:
        """Write pictures and clips, unless they are there."""
        _call("-m", "tools.prepare_emoji", "--out", str(self.out / "pictures"))
        limit = ["--limit", str(CLIP_PICTURES), "--motions", "1"]
        _call("-m", "tools.prepare_emoji", "--out", str(self.out / "clips"), "--clips", "8", *limit)

    def train(self, name: str, tree: dict[str, Any]) -> Path:
        """Run one job; returns its folder."""
        run = self.out / name
        tree["run_dir"] = str(run)
        if self.options.resume and _is_finished(run, tree):
            return run
        if run.exists() and not self.options.resume:
            shutil.rmtree(run)
        config = self.out / "configs" / f"{name}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        print(f"\n{name}: {_steps(tree)} steps", flush=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        torchrun += ["--nproc-per-node", str(RANKS)]
        _call(*torchrun, "-m", "engine.train", str(config))
        return run

    def clip_scores(self, run: Path) -> tuple[Path, Path]:
        """Scores on held-out clips (8 frames) before and after the video phase."""
        ends, done = {}, 0
        for phase in self._clip["phases"]:
            done += phase["steps"]
            ends[phase["name"]] = step_folder(run, done)
        before, after = run / "clips_before.json", run / "clips_after.json"
        self.evaluate(ends[self.compared_phase], "clips", before, "data.frames=8")
        self.evaluate(ends["video"], "clips", after, "data.frames=8")
        return before, after

    def evaluate(self, checkpoint: Path, data: str, out: Path, *more: str) -> None:
        """Score a checkpoint on held-out pictures or clips, on one rank: every layout reads it."""
        alone = ["parallel.tensor=1", "parallel.pipeline=1"]
        held_out = str(self.out / data / "heldout")
        _call("-m", "tools.evaluate", str(checkpoint), held_out, "--out", str(out), *more, *alone)


def _is_finished(run: Path, tree: dict[str, Any]) -> bool:
    metrics = run / METRICS_FILE
    return metrics.is_file() and len(read_metrics(metrics)) == _steps(tree)


def _steps(tree: dict[str, Any]) -> int:
    return sum(part["steps"] for part in tree.get("phases", [tree["train"]]))


def _call(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
