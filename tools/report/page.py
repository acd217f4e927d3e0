"""The HTML page: one file, no script, no outside resource, every text escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape

from tools.report.curves import INK, MUTED, RULE, to_svg
from tools.report.panels import Panel, folded_panels, panels
from tools.report.runs import Run, Sample, evenly_spaced
from tools.report.summary import differences_table, evaluation_table, label, phases_table, runs_table
from tools.report.toll import toll_table
from tools.timeline.picture import save_picture as save_timeline
from tools.timeline.spans import read_step

MAX_IMAGES = 24

_CSS = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1240px; padding: 36px 28px 56px; background: #fff; color: {INK};
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 26px; line-height: 1.25; margin: 0 0 2px; letter-spacing: -0.01em; }}
h2 {{ font-size: 18px; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid {RULE}; }}
h3 {{ font-size: 15px; margin: 22px 0 10px; }}
p {{ margin: 6px 0; }}
.muted {{ color: {MUTED}; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 0 7px 16px; text-align: right; border-bottom: 1px solid {RULE}; vertical-align: top;
  overflow-wrap: break-word; }}
th {{ color: {MUTED}; font-weight: 600; vertical-align: bottom; }}
th:first-child, td:first-child {{ padding-left: 0; text-align: left; }}
.sheet th, .text th, .text td, td:has(.swatch) {{ overflow-wrap: anywhere; }}
.text td, .text th {{ text-align: left; }}
.sheet {{ width: auto; max-width: 100%; min-width: min(420px, 100%); }}
.sheet td:first-child {{ color: {MUTED}; }}
details {{ margin-top: 22px; }} summary {{ cursor: pointer; color: {MUTED}; margin-bottom: 12px; }}
.swatch {{ display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; }}
.wide {{ width: 100%; height: auto; display: block; margin-bottom: 16px; }}
.charts {{ display: grid; gap: 22px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }}
@media (max-width: 640px) {{ body {{ padding: 20px 14px 40px; }} table {{ font-size: 12.5px; }}
  h1 {{ font-size: 21px; overflow-wrap: anywhere; }} th, td {{ padding-left: 8px; }}
  .many {{ font-size: 11px; }} .many td:not(:first-child) {{ overflow-wrap: anywhere; }} }}
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
  table {{ font-size: 10px; }} td, th {{ padding-left: 8px; }} figcaption {{ font-size: 10px; }}
  figure img {{ width: 64px; height: 64px; }}
  .charts {{ grid-template-columns: 1fr 1fr; }} .images {{ grid-template-columns: 1fr 1fr; }} }}
"""


def render(runs: Sequence[Run]) -> str:
    """The whole page of at least one and at most len(PALETTE) runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        _section("Runs", runs_table(runs)),
        _section("Phases", phases_table(runs)),
        _section("Evaluation", evaluation_table(runs)),
        _section("Starts and losses", toll_table(runs)),
        _section("Curves", _curves(runs)),
        _section("Timeline of a step", _timelines(runs)),
        _section("Config differences", differences_table(runs)),
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


def _curves(runs: Sequence[Run]) -> str:
    legend = "&emsp;".join(label(runs, run) for run in runs) if len(runs) > 1 else ""
    folded = folded_panels(runs)
    more = (
        f"<details><summary>{len(folded)} further evaluations</summary>\n{_charts(folded, runs)}\n</details>"
        if folded
        else ""
    )
    note = (
        '<p class="muted">Long curves show the mean of equal stretches of steps; '
        "the band runs from their minimum to their maximum.</p>"
    )
    return f"<p>{legend}</p>\n{_charts(panels(runs), runs)}\n{more}\n{note}"


def _charts(shown: Sequence[Panel], runs: Sequence[Run]) -> str:
    charts = "\n".join(
        f'<div role="img" aria-label="{escape(panel.title)} over training">{to_svg(panel, runs)}</div>'
        for panel in shown
    )
    return f'<div class="charts">\n{charts}\n</div>'


def _timelines(runs: Sequence[Run]) -> str:
    """The last recorded step of the runs that recorded one (log.timeline_steps)."""
    parts = []
    for run in runs:
        if (run.folder / "timeline").is_dir():
            try:
                parts.append(_timeline(run))
            except ValueError as error:  # the run is going on, and not every rank has written yet
                parts.append(f'<p class="muted">{escape(str(error))}</p>')
    return "\n".join(parts)


def _timeline(run: Run) -> str:
    picture = io.BytesIO()
    save_timeline(read_step(run.folder), run.name, picture)
    return f'<img class="wide" alt="{escape(run.name)}: what each rank did" src="{_data_url(picture.getvalue())}">'


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _images(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if run.samples:
            shown = evenly_spaced(run.samples, MAX_IMAGES)
            parts.append(f"<h3>{label(runs, run)}</h3>" if len(runs) > 1 else "")
            parts.append(
                f'<p class="muted">{len(shown)} of {len(run.samples)} samples, evenly spaced. Bold: the '
                "true caption; below it the nearest captions and their cosine; ✓ marks the true one.</p>"
            )
            parts.append('<div class="images">' + "\n".join(_figure(sample) for sample in shown) + "</div>")
    return "\n".join(parts)


def _figure(sample: Sample) -> str:
    guesses = "".join(_guess(caption, score, sample.caption) for caption, score in sample.top)
    return (
        f'<figure><img alt="{escape(sample.caption)}" src="{_data_url(sample.image_png)}">'
        f'<figcaption><p class="truth">{escape(sample.caption)}</p>{guesses}</figcaption></figure>'
    )


def _guess(caption: str, score: float, truth: str) -> str:
    css_class, mark = ("guess right", "✓") if caption == truth else ("guess", "")
    return f'<div class="{css_class}"><i>{mark}</i><span>{escape(caption)}</span><b>{score:.2f}</b></div>'
