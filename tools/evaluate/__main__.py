"""Zero-shot classification, retrieval and probes of a checkpoint, at any layout.

`torchrun --nproc-per-node N -m tools.evaluate CHECKPOINT SHARDS… [--out FILE.json] [--predictions FILE.json]` scores
held-out shards: every different caption (one a line of a sample's .txt) is a candidate for every different picture, and
right for all pictures that have it; top-1 chance is 1 / number of different captions where a picture has one. Pictures
are resized to the model's square.

`torchrun … -m tools.evaluate CHECKPOINT --suite paper|datacomp|video|quick|FILE.yaml --data ROOT --out DIR` scores the
sets that lie in ROOT (docs/evaluation_sets.md says how), and writes results.json, .csv, .md and index.html. Started
again with the same DIR it goes on where it stopped.

CHECKPOINT is a run folder (its newest checkpoint) or a checkpoint folder, trained or converted; the layout is the one
it was written at unless overrides (parallel.tensor=2 …) say otherwise. Samples that cannot be read are left out,
counted and named. With data.frames=8 clips of shards are embedded as in training, by 8 frames each; without it, by
their middle frame.
"""

import argparse
import sys
from pathlib import Path

from engine.evaluation.session import open_session, split_overrides
from engine.parallel.mesh import LayoutError
from engine.resilience.exit import leave
from tools.cli import CommandError, answer, check_file, check_folder, command_parser, positive
from tools.evaluate.held_out import score_shards
from tools.evaluate.suites import PROBES, score_suite


def main(argv: list[str]) -> int:
    """Run the command on this rank; the exit status."""
    rest, overrides = split_overrides(argv)
    arguments = _parser().parse_args(rest)
    return answer(lambda: _run(arguments, overrides), LayoutError)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "evaluate",
        __doc__,
        [
            "python -m tools.evaluate runs/quickstart runs/quickstart/shards/heldout --out runs/quickstart/result.json",
            "torchrun --nproc-per-node 8 -m tools.evaluate runs/18b --suite paper --data /data --out runs/18b/eval "
            "--transform both parallel.tensor=2 parallel.pipeline=4",
        ],
    )
    parser.add_argument("checkpoint", type=Path, help="run or checkpoint folder, trained or converted")
    parser.add_argument("shards", nargs="*", help="entries of data.shards, held out; or --suite")
    parser.add_argument("--out", type=Path, help="scores of shards as JSON; or the folder of a suite's results")
    parser.add_argument("--micro-batch", type=positive, default=64, help="images of one pass through a stage")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (optim.ema_decay)")
    parser.add_argument("--skip-hashes", action="store_true", help="check the sizes of the checkpoint's files only")
    parser.add_argument("--readers", type=positive, default=2, help="threads of a rank that read and decode ahead")
    shards = parser.add_argument_group("of shards")
    shards.add_argument("--predictions", type=Path, help="pictures with their three best captions as JSON")
    shards.add_argument("--pictures", type=positive, default=24, help="how many pictures go into --predictions")
    suites = parser.add_argument_group("of a suite")
    suites.add_argument("--suite", help="paper, datacomp, video, quick or FILE.yaml")
    suites.add_argument("--data", type=Path, help="the folder that holds the sets")
    suites.add_argument(
        "--transform", choices=("squash", "crop", "both"), default="squash", help="how pictures become squares"
    )
    suites.add_argument("--frames", type=positive, nargs="+", default=[1], help="of clips: 1, 8, 16, or several")
    suites.add_argument("--probe", choices=PROBES, nargs="+", default=[], help="fitted on the train part of a set")
    suites.add_argument(
        "--probe-features",
        choices=("pooled", "embeddings"),
        default="pooled",
        help="what linear, sgd and knn see: features before the projection, as published probes do, or embeddings",
    )
    suites.add_argument("--any-size", action="store_true", help="score sets with another number of samples, too")
    suites.add_argument(
        "--save-features", action="store_true", help="embeddings and logits as OUT/features/SET.parquet"
    )
    return parser


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    _check(arguments)
    with open_session(arguments.checkpoint, overrides, arguments.micro_batch) as session:
        (score_suite if arguments.suite else score_shards)(arguments, session)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be said before the towers are loaded."""
    if bool(arguments.suite) == bool(arguments.shards):
        raise CommandError("give SHARDS to score, or --suite with --data and --out, and not both")
    if arguments.suite:
        if arguments.data is None or arguments.out is None:
            raise CommandError("--suite needs --data ROOT, where the sets lie, and --out DIR for the results")
        if arguments.predictions is not None:
            raise CommandError("--predictions shows held-out shards: it has no effect with --suite")
        if arguments.probe_features != "pooled" and not set(arguments.probe) - {"attentive"}:
            raise CommandError("--probe-features is about --probe linear, sgd and knn: it has no effect without them")
        check_folder(arguments.out)
        return
    for option in ("data", "probe", "any_size", "save_features", "transform", "frames", "probe_features"):
        if getattr(arguments, option) != _parser().get_default(option):
            raise CommandError(f"--{option.replace('_', '-')} has no effect without --suite")
    for path in (arguments.out, arguments.predictions):
        if path is not None:
            check_file(path)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
