"""Plan a contrastive job before its GPUs are rented: what fits, how to lay it out, how long it takes, against ZeRO-3.

    python -m tools.plan --model 18b --gpus 360 --gpu a100-40 --nodes-of 8 --global-batch 108000
        [--samples 6e9 | --tokens N] [--patch-dropout 0.5] [--frames 1] [--offload-stash] [--top 10]
        [--write DIR] [--json]

--gpu is a profile of tools/planning/hardware (a100-40, a100-80, h100, h200, b200) or a YAML file of your own.
Memory is derived from what the code keeps, times are projected from the profile; docs/planning.md says how.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import ConfigError, preset_model
from tools.planning.cluster import Cluster
from tools.planning.hardware import load_hardware, profile_names
from tools.planning.layout import PlanError
from tools.planning.search import Found, Job, search
from tools.planning.table import as_json, new_console, show
from tools.planning.write import write_plan
from tools.planning.zero3 import best_zero3

PAPER_SAMPLES = 6e9


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 with one line where nothing can be planned or nothing fits."""
    arguments = _arguments(argv)
    try:
        return _plan(arguments)
    except (ConfigError, PlanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a preset")
    parser.add_argument("--gpus", type=int, required=True, help="of the job")
    parser.add_argument("--gpu", required=True, help="hardware profile or YAML file")
    parser.add_argument("--nodes-of", type=int, default=8, metavar="N", help="GPUs of a node (8)")
    parser.add_argument("--global-batch", type=int, required=True, metavar="B", help="pairs of a step")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--samples", type=float, default=PAPER_SAMPLES, help="pairs to train on (6e9)")
    length.add_argument("--tokens", type=float, help="the same as image tokens that are kept")
    parser.add_argument("--patch-dropout", type=float, default=0.5, help="share of patches that are dropped (0.5)")
    parser.add_argument("--frames", type=int, default=1, help="images of a pair: those of a clip (1)")
    parser.add_argument("--offload-stash", action="store_true", help="keep stage inputs in host memory")
    parser.add_argument("--top", type=int, default=10, help="layouts to print (10)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the best layout as config and scripts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(argv)


def _plan(arguments: argparse.Namespace) -> int:
    _check_numbers(arguments)
    model = preset_model(arguments.model)
    hardware = load_hardware(arguments.gpu)
    cluster = Cluster(hardware=hardware, gpus=arguments.gpus, per_node=arguments.nodes_of)
    job = Job(
        model=model,
        cluster=cluster,
        global_batch=arguments.global_batch,
        patch_dropout=arguments.patch_dropout,
        frames=arguments.frames,
        offload_stash=arguments.offload_stash,
    )
    found = search(job)
    zero3 = best_zero3(model, cluster, job.global_batch, job.patch_dropout, job.frames)
    samples = arguments.samples
    if arguments.tokens is not None:
        samples = arguments.tokens / (job.frames * model.vision.kept_tokens(job.patch_dropout))
    if arguments.json:
        print(json.dumps(as_json(job, found, zero3, samples, arguments.top), indent=1))
    else:
        show(job, found, zero3, samples, arguments.top, new_console())
    if not found.best:
        print(f"error: {_does_not_fit(job, found)}", file=sys.stderr)
        return 1
    if arguments.write is not None:
        for path in write_plan(arguments.model, found.best[0], samples, arguments.write):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("samples", "tokens", "top"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise PlanError(f"--{name} {value:g} must be at least 1")


def _does_not_fit(job: Job, found: Found) -> str:
    nearest = found.nearest
    assert nearest is not None and nearest.layout is not None
    needed = nearest.memory.total
    largest = max(vars(nearest.memory).items(), key=lambda part: part[1])
    fitting = [name for name in profile_names() if load_hardware(name).usable_bytes >= needed]
    advice = f"--gpu {' or '.join(fitting)}" if fitting else "more GPUs, which shorten each stage and its local batch"
    return (
        f"no layout of {job.cluster.gpus} x {job.cluster.hardware.name} fits: the nearest, {nearest.name} with "
        f"micro-batch {nearest.layout.micro_batch}, needs {needed / 1e9:.1f} GB of "
        f"{job.cluster.hardware.usable_bytes / 1e9:.1f} usable ({largest[1] / 1e9:.1f} of them {largest[0]}); it would "
        f"fit with {advice}, or with a smaller --global-batch or more GPUs if the stash or the batch's pixels are large"
    )


if __name__ == "__main__":
    sys.exit(main())
