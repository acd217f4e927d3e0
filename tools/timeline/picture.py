"""The spans of a step as a Gantt chart: one row a rank, coloured by phase, idle time left pale."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory

from tools.report.curves import INK, MUTED, style
from tools.timeline.spans import AWAIT_GRADIENTS, AWAIT_WEIGHTS, WAIT, Row, Span, StepTimeline

# Okabe and Ito's palette for compute (told apart by colour-blind readers), a pale shade where it is the captions';
# greys for communication, so that what is not compute recedes.
COLOURS = {
    "encode": "#0072b2",
    "encode_text": "#7cc3ec",
    "teacher": "#7cc3ec",
    "forward": "#0072b2",
    "loss": "#009e73",
    "replay": "#e69f00",
    "backward": "#d55e00",
    "backward_text": "#f2b48a",
    "optimizer": "#cc79a7",
    "deal": "#8793a0",
    "exchange": "#8793a0",
    "reduce": "#5a6672",
    "gather_weights": "#b4bec8",
    AWAIT_WEIGHTS: "#d9c84a",
    AWAIT_GRADIENTS: "#a8862b",
}
NAMES = {
    "encode": "encode",
    "encode_text": "encode captions",
    "teacher": "teacher",
    "forward": "forward",
    "loss": "loss",
    "replay": "replay",
    "backward": "backward",
    "backward_text": "backward of captions",
    "optimizer": "optimizer",
    "deal": "pixels to teachers",
    "exchange": "exchange of rows",
    "reduce": "reduce gradients",
    "gather_weights": "gather weights",
    AWAIT_WEIGHTS: "wait for sharded weights",
    AWAIT_GRADIENTS: "wait for reduced gradients",
}
IDLE, OTHER = "#f0f2f5", "#c9b8e8"
_WIDTH_IN, _LEFT_IN, _RIGHT_IN, _TOP_IN, _BOTTOM_IN = 13.0, 1.75, 0.85, 0.95, 1.15
_ROWS_IN, _ROW_IN, _LEAST_ROW_IN = 24.0, 0.42, 0.03
_BAR = 0.8
_NUMBER = "number"
"""Group of the texts in the boxes."""
_DIGIT_IN = 0.075
_DPI = 150
_COLUMNS = round((_WIDTH_IN - _LEFT_IN - _RIGHT_IN) * _DPI)
"""Pixels of the time axis."""
_BLENDED_IN, _EDGED_IN, _EDGE_POINTS = 2.5 / _DPI, 0.04, 0.6
_MARGIN_IN = 0.285
_RANK_X = -(_LEFT_IN - _MARGIN_IN) / (_WIDTH_IN - _LEFT_IN - _RIGHT_IN)


def save_picture(timeline: StepTimeline, title: str, path: Path | IO[bytes]) -> None:
    """Write the PNG, 1,950 px wide, to a path or an open file; title names the run."""
    rows = timeline.rows
    row_in = min(_ROW_IN, max(_LEAST_ROW_IN, _ROWS_IN / len(rows)))
    height_in = _TOP_IN + row_in * len(rows) + _BOTTOM_IN
    with style():
        figure = Figure(figsize=(_WIDTH_IN, height_in), facecolor="white")
        axes = figure.add_axes(
            (
                _LEFT_IN / _WIDTH_IN,
                _BOTTOM_IN / height_in,
                1 - (_LEFT_IN + _RIGHT_IN) / _WIDTH_IN,
                row_in * len(rows) / height_in,
            )
        )
        _draw_rows(axes, timeline, row_in)
        _draw_margins(axes, timeline, row_in)
        _draw_header(figure, timeline, title, height_in)
        _draw_legend(figure, rows)
        figure.savefig(path, format="png", dpi=_DPI)


def _draw_rows(axes: Axes, timeline: StepTimeline, row_in: float) -> None:
    total_ms, start_s = timeline.seconds * 1e3, timeline.start_s
    axes.grid(False)
    inches_per_ms = (_WIDTH_IN - _LEFT_IN - _RIGHT_IN) / total_ms
    for y, row in enumerate(timeline.rows):
        low = y - _BAR / 2
        axes.broken_barh([(0, total_ms)], (low, _BAR), facecolors=IDLE)
        drawn = [span for span in row.spans if span.phase != WAIT]
        boxes = [_box(span, start_s) for span in drawn]
        widths_in = [width * inches_per_ms for _, width in boxes]
        if boxes and float(np.median(widths_in)) < _BLENDED_IN:
            _blend(axes, low, drawn, boxes, total_ms)
            continue
        # A white edge parts neighbours; around a box that is hardly wider than the edge it would swallow the box.
        edges = [_EDGE_POINTS if row_in > 0.15 and width > _EDGED_IN else 0.0 for width in widths_in]
        axes.broken_barh(
            boxes, (low, _BAR), facecolors=[_colour(s) for s in drawn], edgecolors="white", linewidth=edges
        )
        if row_in > 0.15:
            _number(axes, y, drawn, boxes, inches_per_ms)
    axes.set_xlim(0, total_ms)
    axes.set_ylim(len(timeline.rows) - 0.5, -0.5)


def _blend(
    axes: Axes, low: float, spans: Sequence[Span], boxes: Sequence[tuple[float, float]], total_ms: float
) -> None:
    """Spans finer than the picture: each column of pixels has the mean colour of its time, as drawn boxes have not.

    Boxes below a pixel would be drawn over each other, each as if the rest of the pixel were idle.
    """
    borders = np.array([(start, start + width) for start, width in boxes])
    inked = np.array([_colour(span) for span in spans]) - to_rgb(IDLE)
    order = borders[:, 0].argsort()
    times = np.maximum.accumulate(borders[order].ravel())  # clocks may say that a span began before the last one ended
    ink = np.repeat((inked[order] * np.diff(borders[order], axis=1)).cumsum(axis=0), 2, axis=0)
    ink[::2] -= inked[order] * np.diff(borders[order], axis=1)
    columns = np.linspace(0, total_ms, _COLUMNS + 1)
    mean = np.stack([np.diff(np.interp(columns, times, channel)) for channel in ink.T], axis=1) / (total_ms / _COLUMNS)
    image = np.clip(mean + to_rgb(IDLE), 0, 1)[None]
    axes.imshow(image, extent=(0, total_ms, low + _BAR, low), aspect="auto", interpolation="nearest", zorder=2)


def _box(span: Span, zero_s: float) -> tuple[float, float]:
    return (span.start_s - zero_s) * 1e3, (span.stop_s - span.start_s) * 1e3


def _number(
    axes: Axes, y: int, spans: Sequence[Span], boxes: Sequence[tuple[float, float]], inches_per_ms: float
) -> None:
    for span, (start, width) in zip(spans, boxes, strict=True):
        if span.label and width * inches_per_ms > _DIGIT_IN * (len(span.label) + 0.6):
            place: Any = {"ha": "center", "va": "center_baseline", "fontsize": 7.5, "gid": _NUMBER}
            axes.text(start + width / 2, y, span.label, color=_ink_on(span), **place)


def _colour(span: Span) -> tuple[float, float, float]:
    """Later chunks of a rank are paler."""
    pale = min(0.45, 0.22 * (span.chunk or 0))
    red, green, blue = (part + (1 - part) * pale for part in to_rgb(COLOURS.get(span.phase, OTHER)))
    return red, green, blue


def _ink_on(span: Span) -> str:
    red, green, blue = _colour(span)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _draw_margins(axes: Axes, timeline: StepTimeline, row_in: float) -> None:
    """Who the rows are, at the left; how idle they were, at the right."""
    every = max(1, round(0.13 / row_in))
    size = min(9.0, max(5.0, 40 * row_in))
    side = blended_transform_factory(axes.transAxes, axes.transData)
    for y, row in list(enumerate(timeline.rows))[::every]:
        place = timeline.place(row)
        axes.text(-0.008, y, place or "alone", transform=side, ha="right", va="center", fontsize=size, color=INK)
        axes.text(_RANK_X, y, f"{row.rank}", transform=side, ha="left", va="center", fontsize=size, color=MUTED)
        axes.text(1.045, y, f"{timeline.idle(row):.0%}", transform=side, ha="right", va="center", fontsize=size)
    axes.text(_RANK_X, 1.0, "rank", transform=axes.transAxes, ha="left", va="bottom", fontsize=8.5, color=MUTED)
    axes.text(1.045, 1.0, "idle", transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=MUTED)
    for y in range(1, len(timeline.rows)):
        if timeline.rows[y].data != timeline.rows[y - 1].data:
            axes.axhline(y - 0.5, color=MUTED, linewidth=0.6)
    axes.set_yticks([])
    axes.set_xlabel("milliseconds since the step began", fontsize=9)
    axes.spines[["left", "right", "top"]].set_visible(False)


def _draw_header(figure: Figure, timeline: StepTimeline, title: str, height_in: float) -> None:
    layout = " × ".join(f"{name} {size}" for name, size in timeline.sizes().items())
    idle = sum(timeline.idle(row) for row in timeline.rows) / len(timeline.rows)
    ranks = f"{len(timeline.rows)} rank{'s' if len(timeline.rows) > 1 else ''}"
    who = f"{ranks}, {layout}" if timeline.step is not None else "one row a stage"
    facts = f"{who}     {timeline.seconds * 1e3:,.0f} ms     idle {idle:.0%} on average"
    head: Any = {"x": _MARGIN_IN / _WIDTH_IN, "va": "center", "parse_math": False}
    name = title if timeline.step is None else f"{title}, step {timeline.step}"
    figure.text(y=1 - 0.28 / height_in, s=name, fontsize=14, fontweight="bold", **head)
    figure.text(y=1 - 0.58 / height_in, s=facts, fontsize=10, color=MUTED, **head)


def _draw_legend(figure: Figure, rows: Sequence[Row]) -> None:
    spans = [span for row in rows for span in row.spans]
    present = {span.phase for span in spans}
    handles = [Patch(color=COLOURS[phase], label=NAMES[phase]) for phase in COLOURS if phase in present]
    handles += [Patch(color=OTHER, label=phase) for phase in sorted(present - {*COLOURS, WAIT})]
    handles.append(Patch(facecolor=IDLE, edgecolor="#d5dbe1", linewidth=0.6, label="idle"))
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.0145, 0.005), ncols=6, handlelength=1.2, handleheight=0.9
    )
    remarks = []
    if any(text.get_gid() == _NUMBER for axes in figure.axes for text in axes.texts):
        remarks.append("numbers: micro-batch")
    if any(span.chunk for span in spans):
        remarks.append(("letters and " if remarks else "") + "paler shades: later chunks")
    if any(axes.images for axes in figure.axes):
        remarks.append("blends: spans finer than the picture")
    note = "; ".join(remarks)
    figure.text(1 - _RIGHT_IN / _WIDTH_IN, 0.02, note, ha="right", fontsize=8.5, color=MUTED)
