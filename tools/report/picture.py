"""The same story as one PNG: loss, learning rate, held-out images with their nearest captions."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from PIL import Image

from tools.report.curves import INK, MUTED, PALETTE, RULE, draw, style
from tools.report.panels import main_panels
from tools.report.runs import Run, Sample, evenly_spaced
from tools.report.summary import times_chance

COLUMNS = 3
MAX_IMAGES = 12
_WIDTH_IN = 12.0
_HEADER_IN = 0.95
_CHARTS_IN = 3.4
_ROW_IN = 1.5
_RIGHT = "#00664b"


def save_picture(runs: Sequence[Run], path: Path) -> None:
    """Write the PNG (1,560 px wide). The images are those of the first run that has any."""
    samples = next((evenly_spaced(run.samples, MAX_IMAGES) for run in runs if run.samples), [])
    rows = -(-len(samples) // COLUMNS)
    heights_in = [_HEADER_IN, _CHARTS_IN] + ([0.5 + rows * _ROW_IN] if rows else [])
    with style():
        figure = Figure(figsize=(_WIDTH_IN, sum(heights_in)), facecolor="white")
        parts = figure.subfigures(len(heights_in), 1, height_ratios=heights_in, squeeze=False)[:, 0]
        _draw_header(parts[0], runs)
        _draw_charts(parts[1], runs)
        if rows:
            _draw_images(parts[2], samples, rows)
        figure.savefig(path, format="png", dpi=130)


def _text(target: Axes | SubFigure, x: float, y: float, text: str, **options) -> None:
    # A "$" in a caption or a folder name is a dollar, not mathematics.
    target.text(x, y, text, parse_math=False, **options)


def _draw_header(part: SubFigure, runs: Sequence[Run]) -> None:
    if len(runs) > 1:
        _text(part, 0.03, 0.62, f"{len(runs)} runs compared", fontsize=16, fontweight="bold", va="center")
        for index, (run, color) in enumerate(zip(runs, PALETTE, strict=False)):
            x = 0.03 + index * 0.94 / len(runs)
            _text(part, x, 0.2, _clip(run.name, 110 // len(runs)), fontsize=10, color=color, fontweight="bold")
        return
    _text(part, 0.03, 0.62, _clip(runs[0].name, 80), fontsize=16, fontweight="bold", va="center")
    _text(part, 0.03, 0.22, _headline(runs[0]), fontsize=10.5, color=MUTED, va="center")


def _headline(run: Run) -> str:
    """The result in one line."""
    parts = [f"{run.records[-1]['step'] + 1:,} steps", f"{run.records[-1]['samples_seen']:,} samples"]
    result = run.result or {}
    if isinstance(result.get("zero_shot_top1"), float):
        parts.append(f"zero-shot top-1 {100 * result['zero_shot_top1']:.1f} % ({times_chance(result)} chance)")
    parts += [
        f"recall@{k} {100 * result[f'recall_at_{k}']:.1f} %"
        for k in (1, 5)
        if isinstance(result.get(f"recall_at_{k}"), float)
    ]
    if "layout" in result:
        parts.append(str(result["layout"]))
    return "  ·  ".join(parts)


def _draw_charts(part: SubFigure, runs: Sequence[Run]) -> None:
    axes = part.subplots(1, 2)
    part.subplots_adjust(left=0.065, right=0.97, bottom=0.17, top=0.88, wspace=0.2)
    shown = main_panels(runs)
    for place, panel in zip(axes, shown, strict=False):
        draw(place, panel, runs)
    for place in axes[len(shown) :]:
        place.set_axis_off()


def _draw_images(part: SubFigure, samples: Sequence[Sample], rows: int) -> None:
    height_in = 0.5 + rows * _ROW_IN
    _text(
        part, 0.03, 1 - 0.22 / height_in, "Held-out images and their nearest captions", fontsize=10.5,
        fontweight="bold", va="center",
    )  # fmt: skip
    grid = part.subplots(rows, COLUMNS, squeeze=False)
    part.subplots_adjust(
        left=0.03, right=0.97, bottom=0.1 / height_in, top=1 - 0.45 / height_in, wspace=0.03, hspace=0.08
    )
    for index, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if index < len(samples):
            _draw_sample(axes, samples[index])


def _draw_sample(axes: Axes, sample: Sample) -> None:
    """One card: the image on the left, the true caption and the guesses on the right."""
    frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=RULE, clip_on=False)
    axes.add_patch(frame)
    image_axes = axes.inset_axes((0.02, 0.14, 0.25, 0.72))
    with Image.open(io.BytesIO(sample.image_png)) as image:
        image_axes.imshow(image.convert("RGBA"))
    image_axes.set_axis_off()
    place = {"transform": axes.transAxes, "va": "top"}
    truth = textwrap.wrap(sample.caption, 32, max_lines=2, placeholder=" …", break_on_hyphens=False) or [""]
    _text(
        axes,
        0.32,
        0.9,
        "\n".join(truth),
        fontsize=8.5,
        fontweight="bold",
        color=INK,
        linespacing=1.3,
        **place,
    )
    for index, (caption, score) in enumerate(sample.top[:3]):
        right = caption == sample.caption
        look = {"fontsize": 7.5, "color": _RIGHT if right else MUTED, **place}
        y = 0.52 - 0.15 * index
        _text(axes, 0.285, y, "✓" if right else "", **look)
        _text(axes, 0.32, y, _clip_middle(caption, 32), **look)
        _text(axes, 0.97, y, f"{score:.2f}", ha="right", **look)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _clip_middle(text: str, length: int) -> str:
    """Leave both ends, more of the tail: captions of one data set often differ only there."""
    if len(text) <= length:
        return text
    head = length // 3
    return text[:head].rstrip() + "…" + text[len(text) - (length - 1 - head) :].lstrip()
