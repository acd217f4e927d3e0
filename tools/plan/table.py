"""The planner's answer for people (tables) and for programs (JSON). Times are projected, memory is derived."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from models.config import ModelConfig
from tools.cost.memory import Memory, checkpoint_bytes
from tools.cost.time import StepTime
from tools.plan.estimate import Estimate
from tools.plan.search import Found, Job

WIDTH = 215
"""Columns of the widest table, whose cells do not wrap."""
EQUAL = 0.005
"""Step times that differ by less than this share are called equal."""
_COLUMNS = [
    "layout",
    "M",
    "k of m",
    "recompute",
    "SP",
    "text\nM",
    "kept outputs\nGB",
    "stash",
    "GB",
    "step s",
    "MFU",
    "HFU",
]
_COLUMNS += ["pairs/s", "days"]
_COLUMNS += ["GPU-hours", "images/s\na node"]


def show(job: Job, found: Found, zero3: Estimate, samples: float, top: int, console: Console) -> None:
    """Print everything."""
    hardware, cluster = job.cluster.hardware, job.cluster
    shown = [*(found.best[:top] or ([found.nearest] if found.nearest else [])), zero3]
    tokens = job.model.vision.kept_tokens(job.patch_dropout)
    per_pair = f"{job.frames} x {tokens}" if job.frames > 1 else f"{tokens}"
    console.print(
        f"{job.model.preset or 'model'}: batch {job.global_batch:,} of {per_pair} image tokens on {cluster.gpus} x "
        f"{hardware.name} ({cluster.nodes} nodes of {cluster.per_node}); {found.tried:,} layouts tried, "
        f"{hardware.usable_bytes / 1e9:.1f} GB usable a GPU and {job.host_bytes / 1e9:.0f} of its host, kernels: "
        f"{job.kernels}"
    )
    console.print(_summary(shown, samples))
    console.print(_parts("Memory of the fullest rank at its peak, GB (derived)", Memory, shown, 1e9))
    console.print(_parts("Step by part, seconds (projected)", StepTime, shown, 1))
    console.print(checkpoint_line(job.model))
    for line in verdict(job, found, zero3):
        console.print(line)


def new_console() -> Console:
    """Wide enough for the tables also where the output is a file."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.width >= WIDTH else Console(highlight=False, width=WIDTH)


def _summary(shown: Sequence[Estimate], samples: float) -> Table:
    table = Table(title=f"Fastest of each TP × PP; duration for {samples:.3g} pairs (projected)")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for entry in shown:
        gb = f"{entry.memory.total / 1e9:.1f}"
        table.add_row(
            entry.name,
            *_settings(entry),
            gb if entry.fits else f"{gb} (no)",
            f"{entry.time.total:.2f}",
            f"{entry.mfu:.1%}",
            f"{entry.hfu:.1%}",
            f"{entry.samples_s:,.0f}",
            f"{entry.days(samples):.1f}",
            f"{entry.gpu_hours(samples):,.0f}",
            f"{entry.images_per_node_s:,.0f}",
        )
    return table


def _settings(entry: Estimate) -> list[str]:
    layout = entry.layout
    if layout is None:
        return [""] * 7
    return [
        str(layout.micro_batch),
        f"{layout.keep} of {layout.micro_batches}",
        layout.recompute,
        ("yes" if layout.sequence else "no") if layout.tensor > 1 else "",
        str(layout.captions_at_once),
        f"{layout.outputs_budget_gb:g}{' on host' if layout.offload_outputs else ''}"
        if layout.outputs_budget_gb
        else "",
        "host" if layout.offload_stash else "",
    ]


def _parts(title: str, kind: type, shown: Sequence[Estimate], unit: float) -> Table:
    names = [field.name for field in fields(kind)]
    table = Table(title=title)
    table.add_column("layout")
    for name in (*names, "total"):
        table.add_column(name, justify="right")
    for entry in shown:
        parts: Any = entry.memory if kind is Memory else entry.time
        row = [getattr(parts, name) / unit for name in (*names, "total")]
        table.add_row(entry.name, *(f"{value:.2f}" for value in row))
    return table


def checkpoint_line(model: ModelConfig) -> str:
    """Size of a full training checkpoint."""
    weights, optimizer = checkpoint_bytes(model, "bf16")
    return (
        f"A training checkpoint: {weights / 1e9:.1f} GB of weights + {optimizer / 1e9:.1f} GB of master weights and "
        f"moments = {(weights + optimizer) / 1e9:.1f} GB (derived)."
    )


def verdict(job: Job, found: Found, zero3: Estimate) -> list[str]:
    """What to choose, and why not the other."""
    usable = job.cluster.hardware.usable_bytes / 1e9
    alone = f"{zero3.name}: {zero3.memory.total / 1e9:.1f} GB, step {zero3.time.total:.2f} s, MFU {zero3.mfu:.1%}"
    if not zero3.fits:
        lines = [f"ZeRO-3 does not fit: its leanest form ({alone}) needs more than the {usable:.1f} GB usable."]
    else:
        lines = [f"{alone}."]
    if not found.best:
        return [*lines, *("ZeRO-3 fits where no 3D layout does: use it, or the advice below.",) * zero3.fits]
    best = found.best[0]
    gain = zero3.time.total / best.time.total - 1
    if best.time.input > EQUAL * best.time.total:
        lines.append(
            f"The CPUs are a limit: {best.time.input:.2f} s of {best.name}'s step is waiting for pixels, with "
            f"{best.images_per_node_s:,.0f} images/s on each node that decodes."
        )
    if job.whole_batch != job.global_batch:
        lines.append(
            f"--global-batch {job.global_batch:,} is not a multiple of the {job.cluster.gpus} GPUs"
            f"{f' x {job.pairs_multiple} pairs that fp8 can cut' if job.pairs_multiple > 1 else ''}, which rules "
            f"layouts out: try {job.whole_batch:,}."
        )
    if not zero3.fits:
        lines.append(f"Choose {best.name}.")
    elif abs(gain) < EQUAL:
        lines.append(f"Choose {best.name}: as fast as ZeRO-3 (within {EQUAL:.1%}).")
    elif gain > 0:
        lines.append(f"Choose {best.name}: {gain:.1%} more pairs/s than ZeRO-3.")
    else:
        lines.append(
            f"Another engine's ZeRO-3 wins: the best layout, {best.name}, makes {-gain:.1%} less pairs/s; it has an "
            "optimizer that does not depend on the number of GPUs and checkpoints for any layout."
        )
    return lines


def as_json(job: Job, found: Found, zero3: Estimate, samples: float, top: int) -> dict[str, Any]:
    """Everything that the tables say."""
    weights, optimizer = checkpoint_bytes(job.model, "bf16")
    return {
        "gpus": job.cluster.gpus,
        "per_node": job.cluster.per_node,
        "hardware": asdict(job.cluster.hardware),
        "global_batch": job.global_batch,
        "patch_dropout": job.patch_dropout,
        "frames": job.frames,
        "samples": samples,
        "checkpoint_bytes": {"weights": weights, "optimizer": optimizer},
        "tried": found.tried,
        "layouts": [entry_json(entry, samples) for entry in found.best[:top]],
        "nearest": entry_json(found.nearest, samples) if found.nearest else None,
        "zero3": entry_json(zero3, samples),
        "verdict": verdict(job, found, zero3),
    }


def entry_json(entry: Estimate, samples: float) -> dict[str, Any]:
    """One estimate."""
    return {
        "name": entry.name,
        "layout": asdict(entry.layout) if entry.layout else None,
        "fits": entry.fits,
        "memory_bytes": asdict(entry.memory) | {"total": entry.memory.total},
        "step_s": asdict(entry.time) | {"total": entry.time.total},
        "mfu": entry.mfu,
        "hfu": entry.hfu,
        "samples_s": entry.samples_s,
        "days": entry.days(samples),
        "gpu_hours": entry.gpu_hours(samples),
        "images_per_node_s": entry.images_per_node_s,
    }
