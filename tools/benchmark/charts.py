"""Pictures of one result and of many."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.benchmark.result import Result, by_time
from tools.report.curves import INK, MUTED, PALETTE, style
from tools.timeline.picture import COLOURS, IDLE, NAMES

_BLUE = PALETTE[0]


def save_result_picture(result: Result, path: Path) -> None:
    """Phases of a step, and the time of every timed step."""
    with style():
        figure = Figure(figsize=(11.0, 3.6), facecolor="white")
        left, right = figure.subplots(1, 2)
        _draw_phases(left, result)
        _draw_steps(right, result)
        figure.text(0.012, 0.94, f"{result.layout}, micro-batch {result.micro_batch_size}", fontsize=12, color=INK)
        figure.tight_layout(rect=(0, 0, 1, 0.92))
        figure.savefig(path, format="png", dpi=130)


def save_sweep_picture(results: Sequence[Result], path: Path) -> None:
    """Throughput of every result; with several numbers of ranks also the best of each against them."""
    scaling = len({result.world_size for result in results}) > 1
    height_in = 1.4 + max(2.4, 0.34 * len(results))
    with style():
        figure = Figure(figsize=(12.0 if scaling else 8.0, height_in), facecolor="white")
        axes = figure.subplots(1, 2 if scaling else 1, squeeze=False)[0]
        _draw_results(axes[0], results)
        if scaling:
            _draw_scaling(axes[1], results)
        figure.tight_layout()
        figure.savefig(path, format="png", dpi=130)


def _draw_phases(axes: Axes, result: Result) -> None:
    phases = by_time(result.phases_s)
    for y, (name, seconds) in enumerate(phases):
        axes.barh(y, seconds, color=COLOURS.get(name, MUTED if name != "wait" else IDLE), height=0.7)
    axes.set_yticks(range(len(phases)), [NAMES.get(name, name) for name, _ in phases])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set(title="Phases of a step", xlabel="seconds, mean over ranks")


def _draw_steps(axes: Axes, result: Result) -> None:
    numbers = range(result.warmup_steps, result.warmup_steps + len(result.step_times_s))
    axes.plot(numbers, result.step_times_s, marker="o", markersize=3.5, linewidth=1.2, color=_BLUE)
    axes.axhline(result.step_s.median, color=MUTED, linewidth=0.8, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set(title="Time of a step", xlabel="step (dashed: median)", ylabel="seconds")


def _draw_results(axes: Axes, results: Sequence[Result]) -> None:
    for y, result in enumerate(results):
        rate = result.samples_per_s_spread
        error = [[rate.median - rate.low], [rate.high - rate.median]]
        axes.barh(y, rate.median, xerr=error, color=_BLUE, ecolor=MUTED, height=0.65)
    axes.set_yticks(range(len(results)), [f"{r.layout}, micro-batch {r.micro_batch_size}" for r in results])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set(title="Throughput", xlabel="samples/s (bar: median step, whisker: slowest and fastest)")


def _draw_scaling(axes: Axes, results: Sequence[Result]) -> None:
    ranks = sorted({result.world_size for result in results})
    best = [max(result.samples_per_s for result in results if result.world_size == n) for n in ranks]
    axes.plot(ranks, best, marker="o", color=_BLUE, label="best layout")
    axes.plot(ranks, [best[0] * n / ranks[0] for n in ranks], "--", color=MUTED, label="as good as the fewest ranks")
    axes.set_xticks(ranks)
    axes.set_ylim(bottom=0)
    axes.set(title="Scaling", xlabel="ranks", ylabel="samples/s")
    axes.legend()
