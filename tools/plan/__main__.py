"""Plan a job before its GPUs are rented: what fits, how to lay it out, how long it takes, against ZeRO-3.

Memory is derived from what the code keeps, times are projected from the hardware profile; docs/planning.md says how.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config.read import Config, ConfigError, check_vocabulary, preset_model
from models.config import ModelConfig
from tools.cli import amount, answer, check_folder, command_parser, complain, positive, ranks
from tools.cost.cluster import Cluster
from tools.cost.hardware import Hardware, load_hardware, profile_names
from tools.cost.kernels import ELEMENTWISE, Kernels
from tools.cost.layout import FrozenModel, PlanError, kernels_of, layout_of
from tools.plan.given import given_config, left_out
from tools.plan.mim import as_json_mim, mim_config, search_mim, show_mim
from tools.plan.search import Found, Job, search
from tools.plan.table import as_json, new_console, show
from tools.plan.write import write_plan
from tools.plan.zero3 import best_zero3

PAPER_SAMPLES = 6e9
_EXAMPLES = (
    "python -m tools.plan --model 18b --gpus 360 --gpu a100-40 --global-batch 108000",
    "python -m tools.plan --model 18b --teacher e14-plus --gpus 360 --gpu a100-40 --global-batch 4320",
    "python -m tools.plan --model l14 --gpus 64 --gpu h100 --global-batch 16384 'train.freeze=[vision.*]'",
    "python -m tools.plan --model l14 --gpus 8 --gpu h100 --global-batch 8192 --samples 2e9 --write plans",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 with one line where nothing can be planned or nothing fits."""
    arguments = _arguments(argv)
    return answer(lambda: _plan(arguments))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("plan", __doc__, _EXAMPLES)
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="settings of the job that the plan does not find"
    )
    parser.add_argument("--model", required=True, help="a preset, such as 18b, 8b, e14-plus, l14, b16, or a YAML file")
    parser.add_argument("--gpus", type=ranks, required=True, help="GPUs of the job")
    parser.add_argument(
        "--gpu", required=True, metavar="PROFILE", help=f"{', '.join(profile_names())}, or a YAML file of your own"
    )
    parser.add_argument("--nodes-of", type=ranks, default=8, metavar="N", help="GPUs of a node")
    parser.add_argument("--global-batch", type=positive, required=True, metavar="B", help="pairs of a step")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--samples", type=amount, default=PAPER_SAMPLES, help="pairs to train on (default: 6e9)")
    length.add_argument("--tokens", type=amount, help="the same as image tokens that are kept")
    parser.add_argument("--teacher", metavar="MODEL", help="plan masked-feature distillation from this preset instead")
    parser.add_argument(
        "--distill",
        metavar="MODEL",
        action="append",
        default=[],
        help="a frozen CLIP that teaches too; may be repeated",
    )
    parser.add_argument("--masked", type=positive, metavar="N", help="patches masked of an image, with --teacher")
    parser.add_argument("--patch-dropout", type=float, default=0.5, metavar="P", help="share of patches dropped")
    parser.add_argument("--frames", type=positive, default=1, metavar="N", help="images of a pair: those of a clip")
    parser.add_argument("--host-gb", type=amount, metavar="GB", help="pinned host memory a GPU may use; 0: none")
    parser.add_argument("--kernels", choices=ELEMENTWISE, default="fused", help="kernels between the products")
    parser.add_argument("--fp8", action="store_true", help="products of the blocks in fp8")
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="layouts to print")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the best layout as config and scripts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_intermixed_args(argv)


def _plan(arguments: argparse.Namespace) -> int:
    samples = arguments.samples if arguments.tokens is None else arguments.tokens
    if samples < 1:
        raise PlanError(f"--{'samples' if arguments.tokens is None else 'tokens'} {samples:g} must be at least 1")
    if arguments.write is not None:
        check_folder(arguments.write)
    hardware = load_hardware(arguments.gpu)
    cluster = Cluster(hardware=hardware, gpus=arguments.gpus, per_node=arguments.nodes_of)
    model = preset_model(arguments.model)
    kernels = _kernels(arguments, hardware, model)
    if arguments.teacher is not None:
        return _plan_mim(arguments, cluster, kernels, samples)
    if arguments.masked is not None:
        raise PlanError(f"--masked {arguments.masked} needs --teacher: the contrastive step masks no patch")
    config = given_config(
        arguments.model,
        arguments.overrides,
        global_batch=arguments.global_batch,
        frames=arguments.frames,
        patch_dropout=arguments.patch_dropout,
    )
    for line in left_out(config):
        print(line, file=sys.stderr)
    given = layout_of(config, 1)
    if given.teachers and arguments.distill:
        raise PlanError(f"--distill {arguments.distill[0]} and train.distill both name teachers: give one of them")
    job = Job(
        model=model,
        cluster=cluster,
        global_batch=arguments.global_batch,
        patch_dropout=arguments.patch_dropout,
        frames=arguments.frames,
        host_gb=arguments.host_gb,
        kernels=kernels,
        teachers=given.teachers or tuple(_teacher(name, model) for name in arguments.distill),
        given=given,
    )
    job.check()
    found = search(job)
    zero3 = best_zero3(model, cluster, job.global_batch, job.patch_dropout, job.frames, kernels, job.teachers, given)
    if arguments.tokens is not None:
        samples /= job.frames * model.vision.kept_tokens(job.patch_dropout)
    if arguments.json:
        print(json.dumps(as_json(job, found, zero3, samples, arguments.top), indent=1))
    else:
        show(job, found, zero3, samples, arguments.top, new_console())
    if not found.best:
        return complain(_does_not_fit(job, found))
    if arguments.write is not None:
        for path in write_plan(arguments.model, found.best[0], samples, arguments.write, arguments.overrides):
            print(f"wrote {path}", file=sys.stderr)
        _say_what_is_missing(config)
    return 0


def _say_what_is_missing(config: Config) -> None:
    """What a start of the written config still refuses: the file of a tokenizer that is not here, or not named."""
    try:
        check_vocabulary(config)
    except ConfigError as error:
        print(f"before it starts: {error}", file=sys.stderr)


def _teacher(name: str, student: ModelConfig) -> FrozenModel:
    """Feature and interactive losses where both are as wide, else the relational one."""
    model = preset_model(name)
    as_wide = model.embed_dim == student.embed_dim
    return FrozenModel(model, "bf16", interactive=as_wide, relational=not as_wide)


def _kernels(arguments: argparse.Namespace, hardware: Hardware, model: ModelConfig) -> Kernels:
    if arguments.fp8 and not hardware.fp8_tflops:
        raise PlanError(f"--fp8: {hardware.name} has no fp8 products")
    if arguments.kernels == "compiled" and not arguments.fp8 and model.vision.norm != "rms":
        raise PlanError(
            f"--kernels compiled is a fused RMSNorm, but the norms of {arguments.model} are {model.vision.norm}: take "
            "fused or eager"
        )
    keeps_scores = kernels_of(model).keeps_scores
    if arguments.fp8:  # Transformer Engine's linears, and its norms
        elementwise = "eager" if arguments.kernels == "eager" else "compiled"
        return Kernels(elementwise=elementwise, fp8=True, keeps_scores=keeps_scores)
    return Kernels(elementwise=arguments.kernels, sums=True, keeps_scores=keeps_scores)


def _plan_mim(arguments: argparse.Namespace, cluster: Cluster, kernels: Kernels, samples: float) -> int:
    idle = {
        "--write": arguments.write,
        "--host-gb": arguments.host_gb,
        "--frames": arguments.frames > 1,
        "--fp8": arguments.fp8,
        "--distill": arguments.distill,
        " ".join(arguments.overrides): arguments.overrides,
    }
    for option, value in idle.items():
        if value:
            raise PlanError(f"{option} is no part of a plan with --teacher: leave it out")
    config = mim_config(arguments.model, arguments.teacher, arguments.masked, arguments.global_batch)
    if arguments.tokens is not None:
        samples /= config.model.vision.tokens
    found = search_mim(config, cluster, kernels)
    if arguments.json:
        print(json.dumps(as_json_mim(found, arguments.top), indent=1))
    else:
        show_mim(config, found, cluster, samples, arguments.top, new_console())
    return 0


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
