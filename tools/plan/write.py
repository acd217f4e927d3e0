"""A plan as files that start it: the config, a torchrun script and a SLURM job."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from engine.config.read import check_layout, load_config
from engine.config.tree import given_settings, whole_model
from engine.config.typed import merged
from tools.cost.layout import Layout
from tools.plan.estimate import Estimate

_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
"""What neither a file nor a job is named by; profiles of one's own are named by people."""
SHARDS = "PATH_TO_SHARDS/{00000..99999}.tar"

_LAUNCH = """\
#!/usr/bin/env bash
# {name} on {gpus} GPUs. Start it on every node, where eva-megatron is installed or from its root:
#
#   {start} bash {file} [dotted.key=value …]
#
# SHARDS      tar shards of the image-text pairs
{head_node}# RUN_DIR     where everything is written, on storage that all nodes share
# DRY_RUN     1, yes, true or on: print the command and start nothing
set -euo pipefail
: "${{SHARDS:?set SHARDS to the tar shards}}"
dry=${{DRY_RUN:-}}
case "${{dry,,}}" in
  1 | y | yes | t | true | on) start() {{ printf '%q ' "$@"; echo; }} ;;
  "" | 0 | n | no | f | false | off) start() {{ exec "$@"; }} ;;
  *) echo "$0: DRY_RUN=$dry is not one of 1, yes, true, on, 0, no, false, off" >&2; exit 2 ;;
esac

# One hardware queue keeps the order of communication and products, which sequence parallelism overlaps by.
export CUDA_DEVICE_MAX_CONNECTIONS="${{CUDA_DEVICE_MAX_CONNECTIONS:-1}}"
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
start torchrun --nnodes {nodes} --nproc-per-node {per_node} {rendezvous} \\
  -m engine.train "$here/{stem}.yaml" "data.shards=$SHARDS" "run_dir=${{RUN_DIR:-runs/{stem}}}" "$@"
"""
_ONE_NODE = dict(start="SHARDS='…/{00000..99999}.tar'", head_node="", rendezvous="--standalone --local-addr 127.0.0.1")
_NODES = dict(
    start="SHARDS='…/{00000..99999}.tar' HEAD_NODE=host",
    head_node="# HEAD_NODE   host name of the first node;  PORT  its free port\n",
    rendezvous="""--rdzv-backend c10d \\
  --rdzv-id "${JOB_ID:-STEM}" --rdzv-endpoint "${HEAD_NODE:?set HEAD_NODE to the first node}:${PORT:-29500}\"""",
)

_SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name={stem}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# {name} on {gpus} GPUs:
#
#   SHARDS='…/{{00000..99999}}.tar' sbatch {stem}.sbatch [dotted.key=value …]
#
# Start it in the folder of {stem}.sh: SLURM runs a copy of this file from elsewhere. A job that is requeued, or
# submitted again after its time ran out, goes on from its last checkpoint.
set -euo pipefail
# A pipe to head could end scontrol by SIGPIPE.
read -r HEAD_NODE < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
PORT=$((20000 + SLURM_JOB_ID % 20000))
# A requeued job keeps its number: ranks of the killed start must not be taken for ranks of this one.
JOB_ID=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}
export HEAD_NODE PORT JOB_ID
srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/{stem}.sh" "$@"
"""


def write_plan(model: str, entry: Estimate, samples: float, folder: Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Write MODEL-GPUS.yaml, .sh and .sbatch for a layout. The config is loaded again and checked for its ranks.

    overrides: `dotted.key=value` that the plan was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = _NO_NAME.sub("-", f"{_label(model)}-{entry.cluster.gpus}x{entry.cluster.hardware.name}")
    place = _ONE_NODE if entry.cluster.nodes == 1 else _NODES
    names = dict(
        name=f"{model}, {entry.name}",
        gpus=entry.cluster.gpus,
        nodes=entry.cluster.nodes,
        per_node=min(entry.cluster.per_node, entry.cluster.gpus),
        stem=stem,
        file=f"{stem}.sh",
        **{key: text.replace("STEM", stem) for key, text in place.items()},
    )
    config = folder / f"{stem}.yaml"
    given = given_settings({}, list(overrides), "plan").arguments
    tree = merged(settings(model, entry, samples), given)
    config.write_text(_header(model, entry) + yaml.safe_dump(tree, sort_keys=False))
    check_layout(load_config(config), entry.cluster.gpus)
    written = [config]
    for suffix, template in ((".sh", _LAUNCH), (".sbatch", _SLURM)):
        script = folder / f"{stem}{suffix}"
        script.write_text(template.format(**names))
        script.chmod(0o755)
        written.append(script)
    return written


def _header(model: str, entry: Estimate) -> str:
    return (
        f"# {model}, {entry.name}, written by tools.plan: {entry.memory.total / 1e9:.1f} GB a GPU (derived),\n"
        f"# step {entry.time.total:.2f} s, MFU {entry.mfu:.1%} (projected). Learning rates and warm-up are defaults.\n"
    )


def _label(model: str) -> str:
    """A model's name without what no file is named by; of a file of one's own the file's."""
    name = Path(model).stem if model.endswith((".yaml", ".yml", ".json")) else model
    return _NO_NAME.sub("-", name).strip("-.") or "model"


_KERNELS = ("backend", "attention", "norm_kernel", "block_kernels", "fp8")
"""What a plan decides of a model's settings, or leaves to the engine."""


def settings(model: str, entry: Estimate, samples: float) -> dict[str, Any]:
    """The config of a layout. A model from a file is written down whole: the file may move, and where is not said.

    Its kernels are those that were planned with, not the file's.
    """
    layout = entry.layout
    assert layout is not None, "ZeRO-3 is compared with, not run"
    parallel: dict[str, Any] = {"tensor": layout.tensor, "pipeline": layout.pipeline}
    if layout.tensor > 1:
        parallel["sequence"] = layout.sequence
    if layout.virtual > 1:
        parallel["virtual"] = layout.virtual
    if layout.layers is not None:
        parallel["layers"] = "balanced"
    if layout.shard != "optimizer":
        parallel["shard"] = layout.shard
    elif layout.round_size not in (layout.pipeline, layout.micro_batches) or layout.group_size:
        parallel["round_size"] = layout.round_size
    if layout.shard_ranks is not None:
        parallel["shard_ranks"] = layout.shard_ranks
    whole = whole_model({"preset": model})
    left_out = ("preset", *_KERNELS, *(() if layout.kernels.fp8 else ("fp8_bf16_blocks",)))
    named = {"preset": model} if whole["preset"] else {k: v for k, v in whole.items() if k not in left_out}
    return {
        "run_dir": f"runs/{_label(model)}",
        "model": named | _kernel_settings(entry),
        "data": {"shards": SHARDS} | ({"frames": layout.frames} if layout.frames > 1 else {}),
        "parallel": parallel,
        "train": {
            "steps": max(1, round(samples / layout.global_batch)),
            "global_batch_size": layout.global_batch,
            "micro_batch_size": layout.micro_batch,
            "text_micro_batch_size": layout.captions_at_once,
            "keep_activations": layout.keep,
            "recompute": layout.recompute,
            "patch_dropout": layout.patch_dropout,
            "precision": layout.precision,
            **_moved(layout),
            **_distilled(layout),
        },
        "checkpoint": {"every_steps": 500},
    }


def _kernel_settings(entry: Estimate) -> dict[str, Any]:
    """Settings of the model for the kernels that were planned with."""
    assert entry.layout is not None
    kernels = entry.layout.kernels
    if kernels.fp8:
        return {"backend": "transformer_engine", "fp8": entry.cluster.hardware.fp8_recipe}
    return {
        "fused": {"block_kernels": "fused"},
        "compiled": {"block_kernels": "torch", "norm_kernel": "compiled"},
        "eager": {"block_kernels": "torch"},
    }[kernels.elementwise]


def _distilled(layout: Layout) -> dict[str, Any]:
    """Teachers of the layout; their weights' place is for the user to fill in."""
    if not layout.teachers:
        return {}
    weights = {True: {}, False: {"feature": 0, "interactive": 0, "relational": 1}}
    found = []
    for number, one in enumerate(layout.teachers, start=1):
        path = f"weights/{one.model.preset or f'teacher_{number}'}"
        found.append({"path": path, "model": one.model.preset or asdict(one.model)} | weights[one.interactive])
    return {"distill": found}


def _moved(layout: Layout) -> dict[str, Any]:
    """Settings of what is kept, and where. Where every micro-batch is kept, the engine refuses to move a stash."""
    repeats = layout.keep < layout.micro_batches
    found: dict[str, Any] = {"offload_stash": True} if layout.offload_stash and repeats else {}
    if layout.outputs_budget_gb and (repeats or layout.recompute == "full"):
        found["outputs_budget_gb"] = layout.outputs_budget_gb
        if layout.offload_outputs:
            found["offload_outputs"] = True
    return found
