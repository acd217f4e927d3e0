"""The HTML page: one file, no script, no outside resource, every text escaped."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from tools.reporting.charts import INK, MUTED, PALETTE, PANELS, RULE, to_svg
from tools.reporting.runs import Run, Sample, config_differences, evenly_spaced

MAX_IMAGES = 24
TAIL_STEPS = 20

_CSS = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1180px; padding: 36px 28px 56px; background: #fff; color: {INK};
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 26px; line-height: 1.25; margin: 0 0 2px; letter-spacing: -0.01em; }}
h2 {{ font-size: 18px; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid {RULE}; }}
h3 {{ font-size: 15px; margin: 22px 0 10px; }}
p {{ margin: 6px 0; }}
.muted {{ color: {MUTED}; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 14px 7px 0; text-align: right; border-bottom: 1px solid {RULE}; vertical-align: top; }}
th {{ color: {MUTED}; font-weight: 600; }}
th, td {{ white-space: nowrap; }}
th:first-child, td:first-child, .text td, .text th {{ text-align: left; }}
.text td {{ overflow-wrap: anywhere; white-space: normal; }}
.text td:first-child {{ white-space: nowrap; }}
.swatch {{ display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; }}
.charts {{ display: grid; gap: 22px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }}
.charts svg {{ width: 100%; height: auto; display: block; }}
.images {{ display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }}
figure {{ margin: 0; display: flex; gap: 14px; padding: 12px; border: 1px solid {RULE}; border-radius: 8px; }}
figure img {{ width: 96px; height: 96px; object-fit: contain; flex: none; }}
figcaption {{ flex: 1; min-width: 0; font-size: 13px; line-height: 1.35; }}
.truth {{ font-weight: 600; margin: 0 0 6px; overflow-wrap: anywhere; }}
.guess {{ display: grid; grid-template-columns: 14px 1fr 38px; gap: 6px; margin-top: 3px; color: {MUTED}; }}
.guess span {{ overflow-wrap: anywhere; }}
.guess b {{ font-weight: 400; text-align: right; font-variant-numeric: tabular-nums; }}
.right {{ color: #00664b; }}
@media print {{ body {{ padding: 0; font-size: 12px; }} figure, .charts > div, tr {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }} * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  .scroll {{ overflow: visible; }} table {{ font-size: 10px; }} th {{ white-space: normal; }}
  td, th {{ padding-right: 8px; }} figcaption {{ font-size: 10px; }}
  figure img {{ width: 64px; height: 64px; }}
  .charts {{ grid-template-columns: 1fr 1fr; }} .images {{ grid-template-columns: 1fr 1fr; }} }}
"""


def render(runs: Sequence[Run]) -> str:
    """The whole page of at least one and at most len(PALETTE) runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        _section("Runs", _summary(runs)),
        _section("Evaluation", _evaluation(runs)),
        _section("Curves", _curves(runs)),
        _section("Config differences", _differences(runs)),
        _section("Held-out images", _images(runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · eva-megatron report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="muted">eva-megatron training report</p>\n'
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" if content else ""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], *, css_class: str = "") -> str:
    """A table of ready HTML cells."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{css_class}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _label(runs: Sequence[Run], run: Run) -> str:
    """Run name behind its colour."""
    color = PALETTE[runs.index(run)]
    return f'<span class="swatch" style="background:{color}"></span>{escape(run.name)}'


def _summary(runs: Sequence[Run]) -> str:
    header = (
        "run", "steps", "samples seen", "loss", "top-1 image → text", "top-1 text → image", "samples / s",
        "waiting for data", "time",
    )  # fmt: skip
    note = (
        f'<p class="muted">Loss and top-1 (within the batch): mean of the last {TAIL_STEPS} steps. '
        "Samples / s: median over all steps. Time: sum of all steps in the file.</p>"
    )
    return _table(header, [[_label(runs, run), *_summary_cells(run)] for run in runs]) + note


def _summary_cells(run: Run) -> list[str]:
    seconds = run.column("step_time_s")
    waiting = np.nansum(run.column("data_time_s")) / max(np.nansum(seconds), 1e-9)
    return [
        f"{run.records[-1]['step'] + 1:,}",
        _number(run.column("samples_seen")[-1], ",.0f"),
        _number(_tail_mean(run.column("loss")), ".4f"),
        _percent(_tail_mean(run.column("i2t_top1"))),
        _percent(_tail_mean(run.column("t2i_top1"))),
        _number(_median(run.samples_per_s()), ",.1f"),
        _percent(waiting),
        _duration(float(np.nansum(seconds))),
    ]


def _evaluation(runs: Sequence[Run]) -> str:
    evaluated = [(run, run.result) for run in runs if run.result is not None]
    if not evaluated:
        return ""
    keys = list(dict.fromkeys(key for _, result in evaluated for key in result))
    header = ["run", *(escape(_result_heading(key)) for key in keys)]
    rows = [
        [_label(runs, run), *(escape(_result_value(key, result.get(key))) for key in keys)] for run, result in evaluated
    ]
    if {"zero_shot_top1", "chance"} <= set(keys):
        place = 1 + keys.index("zero_shot_top1") + 1
        header.insert(place, "over chance")
        for row, (_, result) in zip(rows, evaluated, strict=True):
            row.insert(place, times_chance(result))
    return _table(header, rows)


def times_chance(result: dict[str, Any]) -> str:
    """Zero-shot accuracy as a multiple of guessing, e.g. "157 ×"."""
    top1, chance = result.get("zero_shot_top1"), result.get("chance")
    return f"{top1 / chance:,.0f} ×" if isinstance(top1, float) and chance else "–"


def _result_heading(key: str) -> str:
    return key.replace("zero_shot_top", "zero-shot top-").replace("_at_", "@").replace("_", " ")


def _result_value(key: str, value: Any) -> str:
    if isinstance(value, float) and ("top" in key or "recall" in key or key == "chance"):
        return _percent(value)
    if isinstance(value, int | float) and key == "seconds":
        return _duration(value)
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _curves(runs: Sequence[Run]) -> str:
    legend = "&emsp;".join(_label(runs, run) for run in runs) if len(runs) > 1 else ""
    panels = "\n".join(
        f'<div role="img" aria-label="{escape(panel.title)} over training">{to_svg(panel, runs)}</div>'
        for panel in PANELS
    )
    note = (
        '<p class="muted">Long curves show the mean of equal stretches of steps; '
        "the band runs from their minimum to their maximum.</p>"
    )
    return f'<p>{legend}</p>\n<div class="charts">\n{panels}\n</div>\n{note}'


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    missing = [run.name for run in runs if run.config is None]
    note = f'<p class="muted">No config.yaml in: {escape(", ".join(missing))}.</p>' if missing else ""
    rows = config_differences(runs)
    if not rows:
        return note or '<p class="muted">The configs are equal.</p>'
    cells = [[escape(key), *(escape(value) for value in values)] for key, values in rows]
    return _table(["key", *(_label(runs, run) for run in runs)], cells, css_class="text") + note


def _images(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if run.samples:
            shown = evenly_spaced(run.samples, MAX_IMAGES)
            parts.append(f"<h3>{_label(runs, run)}</h3>" if len(runs) > 1 else "")
            parts.append(
                f'<p class="muted">{len(shown)} of {len(run.samples)} samples, evenly spaced. Bold: the '
                "true caption; below it the nearest captions and their cosine; ✓ marks the true one.</p>"
            )
            parts.append('<div class="images">' + "\n".join(_figure(sample) for sample in shown) + "</div>")
    return "\n".join(parts)


def _figure(sample: Sample) -> str:
    guesses = "".join(_guess(caption, score, sample.caption) for caption, score in sample.top)
    image = base64.b64encode(sample.image_png).decode("ascii")
    return (
        f'<figure><img alt="{escape(sample.caption)}" src="data:image/png;base64,{image}">'
        f'<figcaption><p class="truth">{escape(sample.caption)}</p>{guesses}</figcaption></figure>'
    )


def _guess(caption: str, score: float, truth: str) -> str:
    css_class, mark = ("guess right", "✓") if caption == truth else ("guess", "")
    return f'<div class="{css_class}"><i>{mark}</i><span>{escape(caption)}</span><b>{score:.2f}</b></div>'


def _tail_mean(values: np.ndarray) -> float:
    known = values[-TAIL_STEPS:][np.isfinite(values[-TAIL_STEPS:])]
    return float(known.mean()) if len(known) else float("nan")


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _number(value: float, spec: str) -> str:
    return format(value, spec) if np.isfinite(value) else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if np.isfinite(share) else "–"


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest_s:02d} s" if minutes else f"{seconds:.1f} s"
    )
