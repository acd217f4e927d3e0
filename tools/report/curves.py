"""The curves of a report, drawn once for both outputs: SVG panels of the page, axes of the picture.

A curve longer than `MAX_POINTS` steps shows the mean of equal stretches and a band from their minimum to
their maximum: noise stays visible, and a run of a million steps makes as small a page as one of a hundred.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tools.report.panels import Panel
from tools.report.runs import Run

MAX_POINTS = 150
MOST_MARKED = 40
"""A curve of at most so many values, taken at some of the steps, shows each as a dot."""
_HEADROOM = 1.06
_NAME_SIZE = 7.5
_NAME_CHARACTERS = 80
"""Letters of a phase's name that fit on the whole width of a panel."""
_DASHES: tuple[Literal["-", "--"], ...] = ("-", "--")

# Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too pale on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
INK = "#1f2933"
MUTED = "#61707d"
RULE = "#dde3e8"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@contextmanager
def style() -> Iterator[None]:
    """The look of every chart; nothing outside the block changes."""
    with matplotlib.rc_context(_STYLE):
        yield


def progress_axis(runs: Sequence[Run]) -> tuple[str, str]:
    """(metric, label) of the x axis: steps, or samples seen where the runs' batch sizes differ."""
    same_batch = len({float(np.nanmedian(run.global_batch_sizes())) for run in runs}) == 1
    return ("step", "optimizer step") if same_batch else ("samples_seen", "samples seen")


def draw(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """Draw a panel; `style` is active."""
    x_key, x_label = progress_axis(runs)
    for index, (run, color) in enumerate(zip(runs, PALETTE, strict=False)):
        # Equal curves, the aim of a layout comparison, lie on each other: the lower ones are wider and show.
        width = 1.4 + 0.8 * min(len(runs) - 1 - index, 3)
        for line, dashes in zip(panel.lines, _DASHES, strict=False):
            x, mean, low, high = _buckets(run.column(x_key), line.values(run))
            sparse = len(x) <= MOST_MARKED and len(x) < len(run.records)
            axes.plot(x, mean, dashes, color=color, linewidth=width, marker="." if sparse or len(x) == 1 else "")
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_title(panel.title, pad=9 + (_NAME_SIZE + 3) * any(run.phases() for run in runs))
    axes.set_ylabel(panel.unit)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    _mark_phases(axes, [run for run in runs if any(np.isfinite(line.values(run)).any() for line in panel.lines)], x_key)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        if panel.from_zero:
            axes.set_ylim(bottom=0, top=_HEADROOM * axes.dataLim.ymax if axes.dataLim.ymax > 0 else None)
    if len(panel.lines) > 1:
        _style_legend(axes, panel, runs)


def _mark_phases(axes: Axes, runs: Sequence[Run], x_key: str) -> None:
    """A dotted line where a run begins another phase, its name above the axes, cut to the room up to the next one.

    Equal borders of several runs are drawn once; where there is no room for a name, the table of phases has it.
    """
    borders = {run.records[phase.first][x_key]: phase.name for run in runs for phase in run.phases()[1:]}
    low, high = axes.get_xlim()
    places = sorted(borders)
    for x, following in zip(places, [*places[1:], high], strict=False):
        axes.axvline(x, color=MUTED, linestyle=":", linewidth=0.9)
        name = _fitting(borders[x], int(_NAME_CHARACTERS * (following - x) / (high - low)))
        axes.annotate(
            name, (x, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, 3), textcoords="offset points",
            va="bottom", fontsize=_NAME_SIZE, color=MUTED, parse_math=False,
        )  # fmt: skip


def _fitting(name: str, characters: int) -> str:
    if len(name) <= characters:
        return name
    return f"{name[: characters - 1].rstrip()}…" if characters > 3 else ""


def _short(value: float) -> str:
    """A tick of a few characters: 1400, 0.25, 4e-4."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:.3g}"


def _style_legend(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    handles = [
        Line2D([], [], color=MUTED, linestyle=dashes, linewidth=1.5, label=line.label)
        for line, dashes in zip(panel.lines, _DASHES, strict=False)
    ]
    # On the title's line, at the right: there it never covers a curve.
    above = (1.0, 1.07 if any(run.phases() for run in runs) else 0.99)
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=above, ncols=2, borderaxespad=0.2)


def _buckets(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most MAX_POINTS (x, mean, minimum, maximum) of equal stretches; unknown values are left out."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) == 0:
        return x, y, y, y
    starts = np.unique(np.linspace(0, len(x), min(len(x), MAX_POINTS), endpoint=False).astype(int))
    counts = np.diff(np.append(starts, len(x)))
    x_mean = np.add.reduceat(x, starts) / counts
    y_mean = np.add.reduceat(y, starts) / counts
    return x_mean, y_mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def to_svg(panel: Panel, runs: Sequence[Run]) -> str:
    """A panel as an <svg> element that scales with its container."""
    # Text stays text (small, searchable); ids hash the salt, so two panels of a page never share one.
    with style(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(5.6, 2.9))
        # The same margins everywhere: the axes of the page's panels line up.
        figure.subplots_adjust(
            left=0.135, right=0.975, bottom=0.16, top=0.84 if any(r.phases() for r in runs) else 0.89
        )
        draw(figure.add_subplot(), panel, runs)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
