"""All layouts of a job of masked-feature distillation; the fastest of every TP × PP that fits."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.config.read import Config, MimConfig, resolve
from tools.cli import counted
from tools.cost.cluster import Cluster
from tools.cost.kernels import Kernels
from tools.cost.layout import Layout, PlanError
from tools.cost.mim import MimEstimate, mim_estimate
from tools.cost.work import model_flops
from tools.plan.search import MOST_CHUNKS, MOST_IMAGES

_COLUMNS = ["layout", "M", "m", "units in\nflight", "GB", "step s", "bubble", "MFU", "images/s", "days"]


def mim_config(model: str, teacher: str, masked: int | None, global_batch: int) -> Config:
    """The job of a student and a teacher by the names of their presets. Raises ConfigError."""
    mim: dict[str, Any] = {"teacher": "-", "teacher_model": teacher}
    if masked is not None:  # what counts is how many, not in which blocks
        mim |= {"masked_patches": masked, "min_block": min(MimConfig.min_block, masked)}
    tree = {
        "objective": "mim",
        "model": model,
        "mim": mim,
        "data": {"shards": ["-"]},
        "train": {"global_batch_size": global_batch, "precision": "bf16"},
    }
    return resolve(tree, [])


def search_mim(config: Config, cluster: Cluster, kernels: Kernels) -> list[MimEstimate]:
    """The fastest of each TP × PP that fits, fastest first. Raises PlanError where no layout divides, or none fits."""
    best: dict[tuple[int, int], MimEstimate] = {}
    nearest: MimEstimate | None = None
    for layout in counted("pricing", list(_layouts(config, cluster, kernels)), "layouts"):
        found = mim_estimate(config, layout, cluster)
        if nearest is None or found.peak_bytes < nearest.peak_bytes:
            nearest = found
        place = layout.tensor, layout.pipeline
        fits = found.peak_bytes <= cluster.hardware.usable_bytes
        if fits and (place not in best or found.step_s < best[place].step_s):
            best[place] = found
    if nearest is None:
        raise PlanError(
            f"no TP × PP × DP of {cluster.gpus} GPUs divides --global-batch {config.train.global_batch_size} and the "
            f"student: take a multiple of the GPUs"
        )
    if not best:
        raise PlanError(
            f"no layout of {cluster.gpus} x {cluster.hardware.name} fits: the nearest, {nearest.layout}, needs "
            f"{nearest.peak_bytes / 1e9:.1f} GB of {cluster.hardware.usable_bytes / 1e9:.1f} usable"
        )
    return sorted(best.values(), key=lambda found: found.step_s)


def _layouts(config: Config, cluster: Cluster, kernels: Kernels) -> Iterator[Layout]:
    """Every layout with even chunks that the checks of a config accept."""
    vision, batch = config.model.vision, config.train.global_batch_size
    for tensor in _divisors(min(cluster.per_node, cluster.gpus)):
        if cluster.gpus % tensor or vision.heads % tensor or vision.mlp_hidden % tensor:
            continue
        for pipeline in _divisors(cluster.gpus // tensor):
            data = cluster.gpus // (tensor * pipeline)
            most = min(MOST_CHUNKS, vision.depth // pipeline) if pipeline > 1 else 1
            for virtual in range(1, 1 + most) if batch % data == 0 and pipeline <= vision.depth else ():
                for micro in _divisors(batch // data):
                    rounds = batch // data // micro
                    divides = virtual == 1 or rounds % pipeline == 0
                    if micro <= MOST_IMAGES and divides and micro * vision.tokens % tensor == 0:
                        yield Layout(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual=virtual,
                            data=data,
                            global_batch=batch,
                            micro_batch=micro,
                            patch_dropout=0.0,
                            kernels=kernels,
                        )


def show_mim(
    config: Config, found: Sequence[MimEstimate], cluster: Cluster, samples: float, top: int, console: Console
) -> None:
    """Print the tables."""
    batch, hardware = config.train.global_batch_size, cluster.hardware
    teacher = config.mim.teacher_model
    assert teacher is not None
    console.print(
        f"{config.model.preset or 'model'} taught by {teacher.preset or 'model'}: batch {batch:,} of "
        f"{config.model.vision.tokens} image tokens on {cluster.gpus} x {hardware.name}, "
        f"{hardware.usable_bytes / 1e9:.1f} GB usable a GPU"
    )
    table = Table(title=f"Fastest of each TP × PP; duration for {samples:.3g} images (projected)")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    peak = cluster.gpus * hardware.bf16_flops
    for entry in found[:top]:
        rate = batch / entry.step_s
        table.add_row(
            str(entry.layout),
            str(entry.layout.micro_batch),
            str(entry.layout.micro_batches),
            str(entry.in_flight),
            f"{entry.peak_bytes / 1e9:.1f}",
            f"{entry.step_s:.2f}",
            f"{entry.bubble_s / entry.step_s:.1%}",
            f"{model_flops(config) * rate / peak:.1%}",
            f"{rate:,.0f}",
            f"{samples / rate / 86400:.1f}",
        )
    console.print(table)
    parts = Table(title="Memory of a rank of the first stage at its peak, GB (derived)")
    names = list(found[0].memory_bytes)
    for name in ("layout", *names, "total"):
        parts.add_column(name, justify="left" if name == "layout" else "right")
    for entry in found[:top]:
        values = [*entry.memory_bytes.values(), entry.peak_bytes]
        parts.add_row(str(entry.layout), *(f"{value / 1e9:.2f}" for value in values))
    console.print(parts)


def as_json_mim(found: Sequence[MimEstimate], top: int) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "tensor": entry.layout.tensor,
            "pipeline": entry.layout.pipeline,
            "virtual": entry.layout.virtual,
            "data": entry.layout.data,
            "micro_batch": entry.layout.micro_batch,
            "units_in_flight": entry.in_flight,
            "memory_bytes": entry.memory_bytes,
            "step_s": entry.step_s,
            "bubble_s": entry.bubble_s,
        }
        for entry in found[:top]
    ]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
